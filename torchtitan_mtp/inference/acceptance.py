"""How often heads 2..n draft what head 1 would say itself, and how many tokens a step that makes.

Head k at position i drafts t[i+k]. Speculative decoding keeps the draft if it is head 1's own
choice for that place and the drafts of heads 2..k-1 were kept. Two ways to measure how often:

On a given text, teacher-forced: head 1's choice for t[i+k] is the one it makes at position i+k-1 of
the same text. One forward and n arg maxes, no generation: cheap enough for validation. But the text
is not the model's, and where the model is unsure its heads agree less often.

On the model's own continuation of prompts: greedy decoding writes the continuation, and one forward
over it gives every head's draft at every position. Sequential heads get the continuation itself as
input there; so they do in decoding whenever the drafts before were right, and after a wrong one
nothing depends on them. So the drafts to keep are known at every position, and `count_steps` goes
over them as decoding does, from where one step ended to where the next one begins. That is exact
(ties apart) where a mean over all positions is not: steps begin where a draft was wrong more often
than elsewhere, and what follows there is harder, or easier, to draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mtp.data.targets import IGNORE, Window, make_batch
from torchtitan_mtp.inference.decoding import generate
from torchtitan_mtp.inference.rows import EndIds
from torchtitan_mtp.inference.stats import DraftCounts, expected_tokens_per_step, ratio
from torchtitan_mtp.models.trunk import Trunk

PROMPTS_AT_A_TIME = 16
UNKNOWN = -1  # in place of a token: nothing to compare a draft with


class Acceptance(DraftCounts):
    """Counts over positions: of drafts compared with head 1's choices for their places."""

    @property
    def tokens_per_step(self) -> list[float]:
        """1 + sum_{j <= k} prod_{i <= j} a_i, with drafts up to head k = 2, 3, ..., n: what a step
        yields if steps begin at all positions alike."""
        a = self.conditional
        return [expected_tokens_per_step(a[:drafts]) for drafts in range(1, len(a) + 1)]


class Continuation(NamedTuple):
    """The model's own greedy continuation of some prompts.

    acceptance: over every position of it. tokens: of each prompt's continuation, without the first,
    which comes of the prompt's forward. steps: [prompt][m - 1], the steps of speculative decoding
    with m drafts that make these tokens.
    """

    acceptance: Acceptance
    tokens: list[int]
    steps: list[list[int]]

    @property
    def tokens_per_step(self) -> list[float]:
        """What speculative decoding reaches with m = 1 .. n-1 drafts."""
        total = sum(self.tokens)
        return [ratio(total, sum(steps)) for steps in zip(*self.steps, strict=True)]

    @property
    def standard_errors(self) -> list[float]:
        """Of `tokens_per_step`, from how prompts differ (ratio estimator); nan for one prompt."""
        errors = []
        for rate, steps in zip(self.tokens_per_step, zip(*self.steps, strict=True), strict=True):
            pairs = list(zip(self.tokens, steps, strict=True))
            squares = sum((tokens - rate * count) ** 2 for tokens, count in pairs)
            few = ratio(len(pairs), len(pairs) - 1)
            errors.append(ratio((few * squares) ** 0.5, sum(steps)))
        return errors


def count_agreement(drafts: Tensor, own: Tensor) -> Tensor:
    """What `Acceptance` counts, [4, n-1] int64: a sum over positions, to be added up over batches
    and ranks.

    drafts: [..., n-1], of heads 2..n. own: [..., n-1], head 1's choices for the same places, or
    UNKNOWN.
    """
    known, agreed = own != UNKNOWN, drafts == own
    right = agreed.cumprod(-1).bool()  # heads 2..k agree
    checked = known & F.pad(right[..., :-1], (1, 0), value=True)
    counts = torch.stack((known, agreed, checked, right))  # [4, ..., n-1]
    return counts.flatten(1, -2).sum(1)


def text_agreement(model: Trunk, hiddens: Sequence[Tensor], labels: Tensor) -> Tensor:
    """`count_agreement` on a given text [4, n-1], from its n hidden states [B, S, D] and its labels
    [B, S, n]."""
    if len(hiddens) == 1:
        return labels.new_zeros(4, 0)
    choices, ranks = model.output.argmax(hiddens), model.context_parallel  # [B, S, n]
    if ranks is not None:
        choices, labels = ranks.whole(choices), ranks.whole(labels)
        labels = labels if ranks.rank == 0 else torch.full_like(labels, IGNORE)  # it counts for all
    return count_agreement(choices[..., 1:], own_choices(choices, labels))


def own_choices(choices: Tensor, labels: Tensor) -> Tensor:
    """Head 1's choices [B, S, n-1] on a text, for the places that heads 2..n draft for.

    choices: [B, S, n], every head's most likely token. labels: [B, S, n] (`Batch`): no draft counts
    where there is no target, beyond its document or in padding; nor beyond the window.
    """
    own = _next_choices(choices[..., 0], choices.shape[-1])
    return own.masked_fill_(labels[..., 1:] == IGNORE, UNKNOWN)


def _next_choices(chosen: Tensor, n: int) -> Tensor:
    """[B, S] -> [B, S, n-1]: chosen[i+k-1] at [i, k-2], UNKNOWN beyond the end."""
    return F.pad(chosen, (0, n - 1), value=UNKNOWN).unfold(1, n, 1)[..., 1:].clone()


@torch.inference_mode()
def measure_continuation(
    model: Trunk,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: EndIds = None,
    batch_size: int = PROMPTS_AT_A_TIME,
) -> Continuation:
    """Continue prompts greedily and compare every head's drafts with what came.

    Raises:
        UserError: as `generate`.
    """
    n = model.spec.num_future_tokens
    counts = torch.zeros(4, n - 1, dtype=torch.int64)
    tokens: list[int] = []
    steps: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        new = generate(model, rows, max_new_tokens, eos_id=eos_id).tokens
        drafts, own = _drafts(model, rows, new)
        counts += count_agreement(drafts, own)
        runs = (drafts == own).cumprod(-1).sum(-1)  # [B, L]
        for run, prompt, text in zip(runs.tolist(), rows, new, strict=True):
            run = run[len(prompt) - 1 :][: len(text) - 1]
            tokens.append(len(run))
            steps.append([count_steps(run, m) for m in range(1, n)])
    return Continuation(Acceptance(*counts.tolist()), tokens, steps)


def count_steps(runs: Sequence[int], drafts: int) -> int:
    """Steps of speculative decoding with up to `drafts` drafts each.

    runs[j]: how many drafts, from the first on, are right when the continuation has j + 1 tokens;
    one entry a token to come.
    """
    steps = place = 0
    while place < len(runs):
        place += 1 + min(runs[place], drafts)
        steps += 1
    return steps


def _drafts(
    model: Trunk, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Drafts of heads 2..n at every position of prompt and continuation, and head 1's choices for
    their places, UNKNOWN before the prompt's last position and after the end: [B, L, n-1] each."""
    n = model.spec.num_future_tokens
    length = max(len(p) + len(t) for p, t in zip(prompts, new, strict=True))
    text = torch.zeros(len(prompts), length + n, dtype=torch.int64)
    chosen = torch.full((len(prompts), length), UNKNOWN)
    for b, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
        end = len(prompt) + len(tokens)
        text[b, :end] = torch.tensor([*prompt, *tokens])
        chosen[b, len(prompt) - 1 : end - 1] = torch.tensor(tokens)
    own = _next_choices(chosen, n)
    own[chosen == UNKNOWN] = UNKNOWN  # no step begins there
    batch = make_batch(Window(text, torch.zeros_like(text)), n)
    hiddens = model(batch.to(model.output.weight.device))
    return model.output.argmax(hiddens[1:]).cpu(), own
