"""Expert parallelism: each rank of a group has some of a mixture's experts, and computes them for
the tokens of all.

Rank r of R has experts r E/R to (r + 1) E/R - 1. A rank's rows are sorted by expert, so what goes
to one rank lies together:

    counts of rows by expert -> all ranks      (these also say how much each rank gets)
    rows and their weights   -> the ranks of their experts, which sort them by expert
    experts' outputs         -> back to where the rows came from

Of each expert, rows lie by the rank that they came from, then as they lay there: the same rows in
the same order every time. No row is ever dropped, and a rank may get none.

The sizes of what is sent have to be on the host before it is: once a forward the host waits for the
device, as in TorchTitan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from torchtitan_mtp.models.context_parallel import arrived
from torchtitan_mtp.models.moe import SumRows

_all_to_all = funcol.all_to_all_single


class ExpertParallel:
    """The ranks of a group, to which a mixture's experts are dealt."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.name: Any = group.group_name

    def run(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: Tensor,
        weights: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Rows [R, D], sorted by expert, through the experts of all ranks: [R, D].

        experts: this rank's, of (rows, weights, offsets), as `Experts`. weights [R]: of the rows.
        counts [E]: how many rows are for each expert.
        """
        here, sent, taken = self._sizes(counts)
        there = _Exchange.apply(self.name, taken, sent, rows, weights)
        order, place = _by_expert(here, sum(taken))
        x, w = (SumRows.apply(t, order, place) for t in there)
        y = experts(x, w, here.sum(0).cumsum(0, dtype=torch.int32))
        y = SumRows.apply(y, place, order)
        (back,) = _Exchange.apply(self.name, sent, taken, y)
        return back

    def _sizes(self, counts: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """How many rows this rank gets, by where they come from and for which of its experts
        [R, E / R]; and how many it sends to each rank, and gets from each. The host waits."""
        here = arrived(_all_to_all(counts, None, None, self.name)).unflatten(0, (self.size, -1))
        sent = counts.unflatten(0, (self.size, -1)).sum(1)
        sent, taken = torch.stack((sent, here.sum(1))).tolist()
        return here, sent, taken


def _by_expert(here: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of `total` rows that lie by rank, then by expert, here [R, E / R] of each: their places
    [total, 1] in the order by expert, then by rank, and where each of them is then."""
    expert = torch.arange(here.shape[1], device=here.device).repeat(here.shape[0])
    expert = expert.repeat_interleave(here.flatten(), output_size=total)
    order = expert.argsort(stable=True)
    return order.unsqueeze(1), order.argsort().unsqueeze(1)


class _Exchange(torch.autograd.Function):
    """Tensors [sum(sent), ...] of all ranks: [sum(taken), ...] of those that were sent here."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, taken: list[int], sent: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.route = group, sent, taken
        return _exchange(tensors, group, taken, sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *_exchange(grads, *ctx.route))


def _exchange(
    tensors: Sequence[Tensor], group: Any, taken: list[int], sent: list[int]
) -> tuple[Tensor, ...]:
    under_way = [_all_to_all(x.contiguous(), taken, sent, group) for x in tensors]
    return tuple(arrived(x) for x in under_way)
