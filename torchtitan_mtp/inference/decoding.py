"""Generation, plain and speculative: a model drafts with heads 2..n and verifies with head 1.

Blockwise parallel decoding (Stern, Shazeer and Uszkoreit 2018, arXiv 1811.03115, section 3; with
multi-token heads, Gloeckle et al. 2024, section 3.2). With t[0..p] run through the trunk and t[p+1]
known from head 1, one step is

    predict   heads 2..n at position p draft t[p+2], ..., t[p+n]
    verify    ONE forward of the trunk and head 1 over t[p+1] and the n-1 drafts: its choice after
              each of them
    accept    the longest run of drafts that are what head 1 chose there, and head 1's choice
              after them, which comes for free

so that a step yields 1 to n tokens, all of them head 1's own choices: the text is that of plain
decoding, in fewer forwards. Verification leaves the trunk's states at the accepted positions, from
which the heads draft again: nothing is computed twice. Plain decoding is the case without drafts,
and runs through the same lines.

Exactness. A forward over m tokens and m forwards over one token add in another order, so logits
differ in their last bits. Where head 1's two best tokens are closer than that, a tie as far as the
dtype can tell, plain and speculative decoding may choose differently; else they are equal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.cache import LayerCache, Positions, Span, shifted, take
from torchtitan_mtp.inference.drafting import TrunkStates, build_drafter
from torchtitan_mtp.inference.rows import Rows
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.stats import Stats
from torchtitan_mtp.models.transformer import Transformer


@dataclass(frozen=True)
class Generation:
    """tokens: of each row, the new ones only, eos included where it ended the row."""

    tokens: list[list[int]]
    stats: Stats


class Trunk:
    """The next-token model with a cache: embedding, layers (the last is head 1's), final norm."""

    def __init__(self, model: Transformer, positions: Positions) -> None:
        self.model, self.blocks = model, list(model.layers.values())
        self.caches = [LayerCache(block.attention, positions) for block in self.blocks]

    def __call__(self, tokens: Tensor, span: Span) -> TrunkStates:
        """States at the positions of `span`, from their tokens [B, size]."""
        x = z = self.model.tok_embeddings(tokens)  # [B, size, D]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            z = x
            x = block(x, span.context, cache.at(span))
        return TrunkStates(z, self.model.norm(x))


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    softcap: float | None = None,
    eos_id: int | None = None,
    speculative: bool = False,
    num_draft: int | None = None,
) -> Generation:
    """Continue each prompt by `max_new_tokens` tokens, or up to and with `eos_id`.

    Args:
        temperature, top_k, top_p, seed, softcap: see `Sampler`; 0 is greedy.
        speculative: draft with heads 2..n. The tokens are the same, the time is not.
        num_draft: drafts a step, at most (and by default) n - 1.

    Raises:
        UserError: speculative without heads, an empty prompt, a number out of range.
    """
    begin = time.perf_counter()
    choose = Sampler(temperature, top_k, top_p, seed, softcap)
    drafts = _drafts_per_step(model, num_draft) if speculative else 0
    _check(model, prompts, max_new_tokens)
    rows = Rows(len(prompts), max_new_tokens, eos_id, drafts)

    device, longest = model.tok_embeddings.weight.device, max(map(len, prompts))
    max_len = longest + max_new_tokens + drafts
    positions = Positions(model.args, len(prompts), max_len, device)
    trunk = Trunk(model, positions)
    drafter = build_drafter(model, positions, drafts) if drafts else None
    # [B, max_len + ...]: the text, then drafts
    tokens = torch.zeros(len(prompts), max_len + drafts + 1, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)

    # The prompts, in one forward. What stands after a shorter one is overwritten as it grows.
    span = positions.span([0] * len(prompts), longest)
    last = [len(prompt) - 1 for prompt in prompts]  # p of each row
    states = trunk(tokens[span.where], span)
    first = [p + 1 for p in last]
    target = choose(model.output(take(states.h, last)), first)  # [B, 1]
    tokens[positions.index(first, 1)] = target
    rows.start(target.tolist())
    prompt_seconds = time.perf_counter() - begin

    while (left := rows.left()) > 0:
        count = min(drafts, left - 1)  # the free token needs no draft
        if drafter is not None and count:
            drafter.draft(tokens, states, span, last, count, choose)
        span = positions.span([p + 1 for p in last], count + 1)
        fed = tokens[span.where]  # [B, 1 + count]: t[p+1] and the drafts
        states = trunk(fed, span)
        target = choose(model.output(states.h), [p + 2 for p in last])  # [B, 1 + count]
        grown = rows.accept(fed.tolist(), target.tolist())
        # The accepted drafts are there already; after them, head 1's choice replaces a draft.
        tokens[shifted(span.where, 1)] = target
        last = [p + new for p, new in zip(last, grown, strict=True)]

    rows.stats.seconds = time.perf_counter() - begin
    rows.stats.prompt_seconds = prompt_seconds
    return Generation(*rows.finish())


def _drafts_per_step(model: Transformer, num_draft: int | None) -> int:
    if model.mtp is None:
        raise UserError(
            "speculative decoding drafts with heads 2..n, but this model has head 1 alone; train "
            'it with "mtp" in model.converters, or decode without'
        )
    most = model.mtp.num_future_tokens - 1
    if num_draft is not None and not 1 <= num_draft <= most:
        raise UserError(f"num_draft = {num_draft}: this model's heads draft 1 to {most} tokens")
    return num_draft or most


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("the prompt is empty: give at least one token to go on from")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: expected 1 or more")
    highest, vocab = max(map(max, prompts)), model.tok_embeddings.num_embeddings
    if highest >= vocab:
        raise UserError(
            f"the prompt has token {highest}, but the model's vocabulary is 0 to {vocab - 1}; "
            "use the tokenizer that it was trained with"
        )
