"""Tables about training in 8 bits; in effect when model.converters names them."""

from dataclasses import dataclass, field
from typing import Literal

AUTO_FILTER = "auto_filter_small_kn"


@dataclass
class Float8Linear:
    """Linear layers in float8 by torchao; needs the converter "quantize.linear.float8"."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather parameters in float8; for tensorwise scaling."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute all scales in one collective after the optimizer step; goes with
    enable_fsdp_float8_all_gather."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """torchao's recipe for the scales; None: tensorwise."""

    filter_fqns: list[str] = field(default_factory=list)
    """Layers whose name contains one of these stay as they are; "auto_filter_small_kn": those that
    torchao finds too small to gain. So do all with a side that 16 does not divide, `output` and
    routers. An entry that is in no linear layer's name is an error."""

    emulate: bool = False
    """Compute with float8's rounding where the hardware has no float8; slow, for tests."""


@dataclass
class QuantizedLinear:
    """Linear layers."""

    float8: Float8Linear = field(default_factory=Float8Linear)


@dataclass
class Quantize:
    """Training in 8 bits."""

    linear: QuantizedLinear = field(default_factory=QuantizedLinear)
