"""Linear cross-entropy and arg max of several heads, without their whole logits."""

from torchtitan_mtp.ops.autograd import HeadByHeadLoss
from torchtitan_mtp.ops.chunked import (
    LossOutput,
    accumulation_dtype,
    chunked_argmax,
    head_loss_and_grad,
)
from torchtitan_mtp.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan_mtp.ops.token_losses import LossOptions
from torchtitan_mtp.ops.vocabulary import VocabularyShard

__all__ = [
    "HeadByHeadLoss",
    "LossOptions",
    "LossOutput",
    "VocabularyShard",
    "accumulation_dtype",
    "chunked_argmax",
    "head_loss_and_grad",
    "linear_cross_entropy",
]
