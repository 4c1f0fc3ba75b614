"""The families of heads by name: how one is made, and how it trains head by head.

A family is a subclass of `torchtitan_mtp.models.heads.Heads` and a schedule, in a file of its own;
a row here; and what drafts with it in `torchtitan_mtp.inference.drafting`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.heads import Heads, TrunkEnd
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.mtp.medusa import MedusaHeads
from torchtitan_mtp.mtp.parallel import ParallelHeads, independent_schedule
from torchtitan_mtp.mtp.sequential import SequentialHeads, sequential_schedule
from torchtitan_mtp.ops import HeadByHeadLoss, LossOutput

Schedule = Callable[[Transformer, Batch, HeadByHeadLoss, bool], dict[int, LossOutput]]


class Family(NamedTuple):
    """What the rest of the program knows of a family.

    make: the heads on a trunk's end, of the [mtp] table.
    schedule: the forwards and backwards of one micro-batch (model, batch, loss, whether gradients
        are reduced over the ranks now), head by head; each head's loss by its number 1..n.
    independent: no head reads another's state. So each one's backward can follow its forward, and
        all may share a graph in which states give way to their gradients.
    """

    make: Callable[[TrunkEnd, MTP], Heads]
    schedule: Schedule
    independent: bool


FAMILIES = {  # by `mtp.heads` and `ModelSpec.heads`
    "parallel": Family(ParallelHeads, independent_schedule, independent=True),
    "sequential": Family(SequentialHeads, sequential_schedule, independent=False),
    "medusa": Family(MedusaHeads, independent_schedule, independent=True),
}


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise UserError(f'mtp.heads = "{name}": expected one of {", ".join(FAMILIES)}')
    return FAMILIES[name]
