"""Tables about training in 8 bits; in effect when model.converters names them."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_mtp.config.setting import rule


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
    """Layers whose name contains one of these stay as they are; so do all with a side that 16
    does not divide."""

    emulate: bool = False
    """Compute with float8's rounding where the hardware has no float8; slow, for tests."""


@dataclass
class MXLinear:
    """MXFP8; its converter is not supported, so that these keys have no effect."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """No effect."""

    recipe_name: str = "mxfp8_cublas"
    """No effect."""

    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """No effect."""


@dataclass
class Float8GroupedMM:
    """Float8 expert layers; the converter is not supported, so that these keys have no effect."""

    fqns: list[str] = field(default_factory=list)
    """No effect."""


@dataclass
class MXGroupedMM:
    """MXFP8 expert layers; the converter is not supported, so that these keys have no effect."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """No effect."""

    fqns: list[str] = field(default_factory=list)
    """No effect."""


@dataclass
class QuantizedLinear:
    """Linear layers."""

    float8: Float8Linear = field(
        default_factory=Float8Linear, metadata=rule(renamed_from=("float8",))
    )
    """Linear layers in float8."""

    mx: MXLinear = field(default_factory=MXLinear, metadata=rule(renamed_from=("mx",)))
    """Linear layers in MXFP8."""


@dataclass
class QuantizedGroupedMM:
    """Expert layers."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    """Expert layers in float8."""

    mx: MXGroupedMM = field(default_factory=MXGroupedMM)
    """Expert layers in MXFP8."""


@dataclass
class Quantize:
    """Training in 8 bits."""

    linear: QuantizedLinear = field(default_factory=QuantizedLinear)
    """Linear layers."""

    grouped_mm: QuantizedGroupedMM = field(default_factory=QuantizedGroupedMM)
    """Expert layers."""
