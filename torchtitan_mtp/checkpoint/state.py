"""What a checkpoint holds: flat names to tensors, and a few plain objects.

Model parameters lie at the top level under their own names, as in TorchTitan; optimizer state
lies under `optimizer.` by parameter name, so that it reshards to any number of ranks.
"""

from __future__ import annotations

import logging
import math
import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
MOMENTS = f"{OPTIMIZER}.state."
RNG = "rng"
_PLAIN = (type(None), bool, int, float, str)
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and persistent buffers by name; they share the model's storage.

    Names carry no trace of compile or activation checkpointing. Tied weights appear under every
    name they have.
    """
    return {plain_name(k): _plain(v) for k, v in get_model_state_dict(model).items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Flat optimizer state: `optimizer.state.NAME.exp_avg`, `optimizer.param_groups.NAME.lr`; the
    tensors are the optimizer's own. Parameters that were never stepped have no state in it."""
    names = {param: plain_name(name) for name, param in model.named_parameters()}
    found: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            moments = optimizer.state.get(param, {}).items()
            found |= {f"{OPTIMIZER}.state.{names[param]}.{key}": v for key, v in moments}
            found |= {
                f"{OPTIMIZER}.param_groups.{names[param]}.{key}": value
                for key, value in group.items()
                if key != "params"
            }
    return found


def empty_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer_state` as it will be once every parameter was stepped: what to load into.

    Discards the optimizer's present state and the model's gradients.
    """
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    with warnings.catch_warnings():  # the invented step is not one that a scheduler must follow
        warnings.simplefilter("ignore")
        get_optimizer_state_dict(model, optimizer)  # invents it, by a step with zero gradients
    return optimizer_state(model, optimizer)


def parameter_of(key: str) -> str:
    """The parameter of a flat optimizer key: `optimizer.state.NAME.exp_avg` -> NAME."""
    return key.split(".", 2)[2].rpartition(".")[0]


def plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _plain(value: Any) -> Any:
    """A tensor without torchao's float8 all-gather wrapper, sharing storage; else the value.

    Wrapped, it would be written as that class, and read back only where torchao is.
    """
    local = value.to_local() if isinstance(value, DTensor) else value
    inner = getattr(local, "_tensor", None)
    if not isinstance(local, torch.Tensor) or not isinstance(inner, torch.Tensor):
        return value
    if not isinstance(value, DTensor):
        return inner.detach()
    return DTensor.from_local(
        inner.detach(),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def cast_weights(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """Weights in `dtype`; `what` names them in the error, which has the first value that is not
    finite, or is too large for `dtype`."""
    found = tensor.to(dtype)
    if is_finite(found):
        return found
    at = (~local_part(found).isfinite()).flatten().nonzero()[0]
    value = local_part(tensor).flatten()[at].item()
    why = f"which {dtype} can't hold; choose a wider one" if math.isfinite(value) else ""
    raise UserError(f"{what} holds {value:.6g}, {why or 'which no weight is; take other weights'}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite (of a DTensor: of this rank's part), without another copy."""
    local = local_part(tensor)
    return not local.numel() or bool(torch.stack(local.aminmax()).isfinite().all())


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cast_floating(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating tensors of `state` in `dtype`, others as they are, and so are experts' biases, which
    are many small steps added up. Error: as `cast_weights`."""
    kept = {k for k, v in state.items() if not v.is_floating_point() or k.endswith(".expert_bias")}
    return {k: v if k in kept else cast_weights(v, dtype, k) for k, v in state.items()}


def quiet() -> None:
    """From here on, without DCP's warning that one process alone is one process alone."""
    warnings.filterwarnings("ignore", message=".*single process.*")


def check_plain(name: str, value: Any) -> None:
    """Refuse, by a TypeError, what could be saved but not be loaded again safely."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_plain(f"{name}[]", item)
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name}: {kind} can't go into a checkpoint, plain data can")


def rng_state() -> dict[str, Any]:
    """This rank's random number generators: torch's on CPU and CUDA, Python's and numpy's."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        # a plain list: arrays need numpy's classes to load
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put `rng_state` back; without a GPU, now or then, CUDA's is left as it is."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
