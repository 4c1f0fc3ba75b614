"""torchao's float8 training for every linear layer but `output` and the routers of experts."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from torchtitan_mtp.config import Float8Linear, JobConfig
from torchtitan_mtp.errors import UserError


def convert_to_float8(model: nn.Module, float8: Float8Linear, compiled: bool = False) -> None:
    """Swap `nn.Linear` for torchao's `Float8Linear`, in place, on the meta device.

    Left alone: `output` (its projection runs inside the loss), routers (which decide in float32),
    experts (whose products are grouped), layers whose name holds an entry of `filter_fqns`, and
    layers whose sides are not multiples of 16 (float8 products need that).
    Hardware without float8 products needs `emulate`; a CPU always emulates, which torch.compile
    (`compiled`) can't do.
    """
    # It warns of CUDA extensions that it could not load and this code does not use.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(
            f'model.converters names "quantize.linear.float8", which needs torchao: {error}'
        ) from None
    has_units = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    if torch.cuda.is_available() and not has_units and not float8.emulate:
        raise UserError(
            "quantize.linear.float8: this GPU has no float8 products (compute capability 8.9 or "
            "later); set quantize.linear.float8.emulate = true to test on it"
        )
    emulate = float8.emulate or not has_units
    if emulate and compiled:
        raise UserError(
            "quantize.linear.float8 is emulated on this machine, and torch.compile can't compile "
            "the emulation; set compile.enable = false"
        )
    if float8.recipe_name in ("rowwise", "rowwise_with_gw_hp"):
        config = Float8LinearConfig.from_recipe_name(float8.recipe_name)
        object.__setattr__(config, "emulate", emulate)  # the config class is frozen
    else:
        config = Float8LinearConfig(
            enable_fsdp_float8_all_gather=float8.enable_fsdp_float8_all_gather, emulate=emulate
        )

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or any(f in name for f in float8.filter_fqns):
            return False
        if name == "output" or name.endswith("router.gate"):
            return False
        return module.in_features % 16 == module.out_features % 16 == 0

    convert_to_float8_training(model, config=config, module_filter_fn=wanted)


def float8_scales_after_step(config: JobConfig) -> Callable[[nn.Module], None] | None:
    """What computes all weights' scales in one collective after an optimizer step, if asked."""
    float8 = config.quantize.linear.float8
    in_use = "quantize.linear.float8" in config.model.converters
    if not (in_use and float8.precompute_float8_dynamic_scale_for_fsdp):
        return None
    if not float8.enable_fsdp_float8_all_gather:
        raise UserError(
            "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp = true needs "
            "enable_fsdp_float8_all_gather = true, whose scales it computes; set both or neither"
        )
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    return precompute_float8_dynamic_scale_for_fsdp
