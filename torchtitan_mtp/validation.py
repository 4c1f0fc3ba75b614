"""Losses, accuracies and acceptance of the heads on a text: the loop of a run's validation and of
`scripts/evaluate.py`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_mtp.data.targets import IGNORE, PADDING, Batch, Window, make_batch
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.distributed.mesh import all_reduce
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.acceptance import Acceptance, text_agreement
from torchtitan_mtp.inference.stats import ratio
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.monitoring.baselines import comparison_table, skip_bigram_entropies
from torchtitan_mtp.monitoring.losses import HeadLosses, StepLosses
from torchtitan_mtp.ops import LossOptions, linear_cross_entropy


@dataclass(frozen=True)
class TextMetrics(HeadLosses):
    """Of a text, beside its losses: the acceptance of heads 2..n, the number of tokens read on this
    rank, padding included, and the bytes of head 1's targets as UTF-8, where they were counted."""

    acceptance: Acceptance
    tokens: int
    num_bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Head 1's loss in bits over the text's bytes; a document's end costs bits, has none."""
        return ratio(self.losses[0] * self.targets[0] / math.log(2), self.num_bytes)


@torch.no_grad()
def evaluate_batches(
    model: Trunk,
    batches: Iterable[Batch],
    device: torch.device,
    options: LossOptions,
    group: dist.ProcessGroup | None = None,
    forward: Callable[[Batch], list[Tensor] | None] | None = None,
) -> TextMetrics:
    """Losses, accuracies and acceptance on batches, over the ranks of a group, or all.

    forward: the model's, or what stands for it: the hidden states of n heads [B, S, D] of a batch
    on the device; None on a rank that has not got the model's end.
    """
    n = model.spec.num_future_tokens
    losses, tokens = StepLosses(n, device, group), 0
    compute = functools.partial(linear_cross_entropy, options=options)
    agreement = torch.zeros(4, n - 1, dtype=torch.int64, device=device)
    for batch in batches:
        batch = batch.to(device)
        tokens += batch.tokens.numel()
        if (hiddens := (forward or model)(batch)) is not None:
            losses.add(*model.output.loss(hiddens, batch.labels, compute))
            agreement += text_agreement(model, hiddens, batch.labels)
    means = losses.send()  # before the host waits
    acceptance = Acceptance(*all_reduce(agreement, group=group).tolist())
    return TextMetrics(**vars(means()), acceptance=acceptance, tokens=tokens)


def evaluate_windows(
    model: Trunk,
    windows: Iterable[Window],
    tokenizer: Tokenizer,
    *,
    batches: int = -1,
    softcap: float | None = None,
) -> TextMetrics:
    """`evaluate_batches` of `batches` windows [B, S+n] (-1: all of them), with the text's bytes."""
    labels = []

    def read() -> Iterator[Batch]:
        n = model.spec.num_future_tokens
        for window in itertools.islice(windows, batches if batches >= 0 else None):
            batch = make_batch(window, n)
            labels.append(batch.labels[..., 0].flatten())
            yield batch

    found = evaluate_batches(
        model, read(), model.output.weight.device, LossOptions(softcap=softcap)
    )
    if not labels:
        raise UserError("the text is empty: nothing to evaluate on")
    return replace(found, num_bytes=count_bytes(torch.cat(labels), tokenizer))


def count_bytes(labels: Tensor, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that head 1's targets stand for.

    labels: [N] of consecutive positions, IGNORE where a document ends. A document is decoded as a
    whole, since a character may be spread over several tokens; where the labels begin or end
    within one, it may count as a byte or two more.
    """
    ends = (labels == IGNORE).nonzero().squeeze(1)
    return sum(
        len(tokenizer.decode(piece[piece != IGNORE].tolist()).encode())
        for piece in torch.tensor_split(labels, ends)
    )


def compare_with_bigrams(found: TextMetrics, batches: Sequence[Batch], vocab_size: int) -> str:
    """A table of the heads beside what pair statistics of the same text would reach. batches: this
    rank's, which all ranks put together."""
    real = [batch.doc_ids != PADDING for batch in batches]
    own = [(b.tokens[r], b.labels[r]) for b, r in zip(batches, real, strict=True)]
    pairs = zip(*itertools.chain.from_iterable(Ranks().gather(own)), strict=True)
    tokens, labels = (torch.cat(part).numpy() for part in pairs)
    entropies = skip_bigram_entropies(tokens, labels, vocab_size)
    return comparison_table(found.losses, found.accuracies, entropies)
