"""Heads that have nothing to learn from."""

import logging
from collections.abc import Sequence

import torch.distributed as dist

from torchtitan_mtp.data.targets import PADDING, Batch

logger = logging.getLogger(__name__)


class MissingTargets:
    """Says once of each head that it had not a single target, and why."""

    def __init__(self) -> None:
        self._said: set[int] = set()

    def check(self, where: str, targets: Sequence[float], batches: Sequence[Batch]) -> None:
        """targets: how many heads 1..n had, over all ranks. batches: some of rank 0's."""
        new = [k for k, count in enumerate(targets, 1) if not count and k not in self._said]
        self._said.update(new)
        if new and dist.get_rank() == 0:
            heads = f"head {new[0]}" if any(targets) else "any head"
            logger.warning("%s: no target of %s: %s", where, heads, _cause(batches, new[0]))


def _cause(batches: Sequence[Batch], k: int) -> str:
    docs = [batch.doc_ids for batch in batches]  # [B, S]
    if any(((doc[:, k:] == doc[:, :-k]) & (doc[:, k:] != PADDING)).any() for doc in docs):
        return "all that it could predict is prompt, which is no target"
    return f"no document here has more than {k} tokens"
