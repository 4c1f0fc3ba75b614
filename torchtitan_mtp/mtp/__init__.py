"""Multi-token prediction: heads, the transform that adds them, their objective and engines."""

from torchtitan_mtp.mtp.engine import ENGINES
from torchtitan_mtp.mtp.objective import clear_unused_gradients, head_scales, head_weights
from torchtitan_mtp.mtp.transform import add_heads, copy_last_layer

__all__ = [
    "ENGINES",
    "add_heads",
    "clear_unused_gradients",
    "copy_last_layer",
    "head_scales",
    "head_weights",
]
