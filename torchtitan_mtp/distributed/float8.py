"""torchao's float8 training for every linear layer but `output` and the routers of experts."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import nn

from torchtitan_mtp.config import Float8Linear, JobConfig
from torchtitan_mtp.config.sections.quantize import AUTO_FILTER
from torchtitan_mtp.errors import UserError

# Whatever filter_fqns says: outputs and routers, by TorchTitan's and by transformers' names.
_KEPT = ("output", "lm_head", "moe.router.gate", ".gate", ".router", "shared_expert_gate")


def convert_to_float8(model: nn.Module, float8: Float8Linear, compiled: bool = False) -> None:
    """Swap `nn.Linear` for torchao's `Float8Linear`, in place, on the meta device.

    Left alone: `output` (its projection runs inside the loss), routers (which decide in float32),
    experts (whose products are grouped), layers whose name holds an entry of `filter_fqns`, layers
    whose sides are not multiples of 16 (float8 products need that), and with "auto_filter_small_kn"
    in `filter_fqns` those that torchao knows to be too small to gain.
    Hardware without float8 products needs `emulate`; a CPU always emulates, which torch.compile
    (`compiled`) can't do.
    """
    # It warns of CUDA extensions that it could not load and this code does not use.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import torchao.float8 as ao

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
    recipe = float8.recipe_name or "tensorwise"
    if compiled and recipe != "tensorwise":
        # What the backward computes again has to round as the forward did, where the compiler would
        # fuse the rounding away: losses became nan otherwise (pytorch/pytorch issue 150859).
        from torch._inductor import config as inductor

        inductor.emulate_precision_casts = True
    gather = recipe == "tensorwise" and float8.enable_fsdp_float8_all_gather
    config = ao.Float8LinearConfig.from_recipe_name(recipe)
    config = replace(config, emulate=emulate, enable_fsdp_float8_all_gather=gather)

    filters = [entry for entry in float8.filter_fqns if entry != AUTO_FILTER]
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    _check_filters(filters, linear)
    gains = ao._auto_filter_for_recipe(recipe, []) if AUTO_FILTER in float8.filter_fqns else None

    def wanted(module: nn.Module, name: str) -> bool:
        if name not in linear or any(f in name for f in filters) or name.endswith(_KEPT):
            return False
        fits = all(side % 16 == 0 for side in linear[name].weight.shape)
        return fits and (gains is None or gains(module, name))

    if not any(wanted(module, name) for name, module in linear.items()):
        raise UserError(
            'model.converters names "quantize.linear.float8", but sizes and filter_fqns = '
            f"{float8.filter_fqns} leave no linear layer for it; take it out"
        )
    ao.convert_to_float8_training(model, config=config, module_filter_fn=wanted)


def _check_filters(filters: Sequence[str], names: Collection[str]) -> None:
    """Refuse an entry that keeps nothing; what is kept in any model needs no place in this one."""
    known = sorted({AUTO_FILTER} | {".".join(name.split(".")[-2:]) for name in names})
    for entry in filters:
        if not entry or not any(entry in name for name in (*_KEPT, *names)):
            nearest = difflib.get_close_matches(entry, known, n=1)
            raise UserError(
                f"quantize.linear.float8.filter_fqns names {entry!r}, which no linear layer's name "
                "contains" + (f"; did you mean {nearest[0]!r}?" if nearest else "; take it out")
            )


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
