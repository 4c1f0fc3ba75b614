"""A vocabulary that is spread over the ranks of a group: each has some rows of the unembedding.

All ranks have the same hidden states and labels, and each the logits of its own tokens. A row's
loss needs no more of the others than maxima and sums over tokens, a few numbers a row: a chunk of
rows takes two reductions over the group, one of maxima (the label's logit among them, -inf where
the label is not) and one of sums; against a teacher a third. The gradient in the own logits follows
from these, the gradient of the own rows of the weight from that, and so does this rank's part of
the gradient in the hidden states, which the caller has to sum over the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from torchtitan_mtp.errors import UserError


class VocabularyShard(NamedTuple):
    """The tokens of this rank: `first` and those after it, as many as its weight has rows.

    Attributes:
        group: the name of the group.
        first: this rank's first token.
        total: number of tokens on all ranks.
    """

    group: Any
    first: int
    total: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, total: int) -> VocabularyShard:
        """This rank's, as torch's `Shard(0)` deals rows: as many to each, fewer to the last.

        Error: some ranks would have none.
        """
        ranks = group.size()
        rows = -(-total // ranks)
        if rows * (ranks - 1) >= total:
            raise UserError(
                f"a vocabulary of {total} tokens on {ranks} ranks, {rows} to each, leaves some "
                "without any; take fewer ranks"
            )
        return cls(group.group_name, rows * group.rank(), total)


def over_ranks(
    op: str, columns: Sequence[Tensor], vocabulary: VocabularyShard | None
) -> Sequence[Tensor]:
    """Columns [C, 1] of all ranks, reduced by `op` ("max", "min", "sum") in one collective."""
    if vocabulary is None:
        return columns
    reduced = funcol.all_reduce(torch.cat(tuple(columns), dim=1), op, vocabulary.group)
    if isinstance(reduced, funcol.AsyncCollectiveTensor):
        reduced = reduced.wait()
    return reduced.split(1, dim=1)


def first_of_the_best(logits: Tensor, tokens: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """From each rank's logits [C, V] and their arg max [C], that of all, the first token where
    several are equal. As for torch's argmax, nothing is larger than NaN."""
    best = logits.gather(1, tokens.unsqueeze(1))
    best = best.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    (largest,) = over_ranks("max", [best], vocabulary)
    candidates = tokens.unsqueeze(1) + vocabulary.first
    candidates = candidates.masked_fill(best < largest, vocabulary.total)
    (first,) = over_ranks("min", [candidates], vocabulary)
    return first.squeeze(1)
