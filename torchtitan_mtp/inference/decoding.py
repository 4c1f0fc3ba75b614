"""Generation, plain and speculative: a model drafts with heads 2..n and verifies with head 1.

Blockwise parallel decoding (Stern, Shazeer and Uszkoreit 2018, arXiv 1811.03115, section 3; with
multi-token heads, Gloeckle et al. 2024, section 3.2). With t[0..p] run through the trunk and t[p+1]
known from head 1, one step is

    predict   heads 2..n at position p draft t[p+2], ..., t[p+n]
    verify    ONE forward over t[p+1] and the n-1 drafts: head 1's choice after each of them
    accept    the longest run of drafts that are what head 1 chose there, and its choice after them

so that a step yields 1 to n tokens, all of them head 1's own choices. (When tokens are sampled,
"choice" is what `sampling.py` makes of it.) The trunk runs over no position of the text twice:
verification leaves its states at the accepted positions, from which the heads draft again. Plain
decoding is the case without drafts. docs/decoding.md says when rounding lets the two differ.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.cache import LayerCache, Positions, Span, advance, shift_index, take
from torchtitan_mtp.inference.draft_length import DraftLength
from torchtitan_mtp.inference.drafting import Plan, build_drafter
from torchtitan_mtp.inference.rows import EndIds, Generation, Rows
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.static_steps import StaticSteps, cuda_graph, room
from torchtitan_mtp.inference.text_stream import TextStream
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.transfer import to_device

# Of steps whose number of keys grows: not cuDNN's, which makes a plan for each number.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.inference_mode()
def generate(
    model: Trunk,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    softcap: float | None = None,
    eos_id: EndIds = None,
    speculative: bool = False,
    num_draft: int | Literal["auto"] | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    texts: Sequence[TextStream] = (),
) -> Generation:
    """Continue each prompt by `max_new_tokens` tokens, or up to and with `eos_id` (of several,
    the first that comes) or the token that completes a stop string.

    Args:
        temperature: 0 is greedy; else tokens are samples from the softmax of logits / temperature.
        top_k: sample among the k most likely tokens.
        top_p: among the most likely that together have this probability, after top_k.
        seed: of all samples; a seed of each prompt makes its sample what it is alone (drafts,
            whose number is the batch's, aside).
        softcap: logits are softcap * tanh(logits / softcap), as in training.
        speculative: draft with heads 2..n. Greedy: the tokens are the same. Sampled: their
            distribution is.
        num_draft: drafts a step, at most (and by default) n - 1; "auto" takes the number that
            has paid best of late (`DraftLength`).
        compile: compile a step of this project's blocks; the first of a batch size wait for it.
        cuda_graphs: launch such a step as a whole, on a GPU; with `compile` or without.
        texts: one of each prompt, if any; they take its new tokens and know its stop strings.

    Raises:
        UserError: speculative without heads, compile or cuda_graphs without blocks of this
            project, cuda_graphs without a GPU, an empty prompt, a number out of range.
    """
    begin = time.perf_counter()
    check(model, prompts, max_new_tokens)
    if (compile or cuda_graphs) and not model.native_blocks:
        name = "compile" if compile else "cuda_graphs"
        raise UserError(f'{name}: not where transformers runs the model ("hf"); leave it out')
    sampler = Sampler(temperature, top_k, top_p, seed, softcap)
    most = most_drafts(model, num_draft) if speculative else 0
    decoder = Decoder(model, prompts, max_new_tokens, most, sampler, compile, cuda_graphs)
    rows = Rows(len(prompts), max_new_tokens, eos_id, most, texts)
    length = DraftLength(most, len(model.layers), adapt=num_draft == "auto")
    rows.start(decoder.prefill())
    prompt_seconds = time.perf_counter() - begin
    while (left := rows.left()) > 0:
        count = length.next()
        if decoder.static is None:
            # The last token needs no draft; in static shapes, one of its own would cost more.
            count = min(count, left - 1)
        fed, target = decoder.run(decoder.plan(count)).tolist()  # the one wait for the device
        decoder.accept(rows.accept(fed, target))
        length.learn(rows.stats)
    return rows.finish(prompt_seconds, time.perf_counter() - begin)


class Decoder:
    """The model with its caches and the text of every row: the steps of the essay above.

    tokens: [B, width] int64, each row's prompt, what was accepted, and the drafts after it.
    last: p of each row. static: runs steps in few shapes, where they are compiled or recorded.
    """

    def __init__(
        self,
        model: Trunk,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_draft: int,
        sampler: Sampler,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.sampler = model, sampler
        weight, longest = model.tok_embeddings.weight, max(map(len, prompts))
        max_len = longest + max_new_tokens + num_draft
        self.static: StaticSteps | None = None
        if compile or cuda_graphs:
            max_len, record = room(max_len), cuda_graph(weight.device) if cuda_graphs else None
            step = functools.partial(
                _compiled(predict_and_verify) if compile else predict_and_verify, self
            )
            # A step adds so many positions at most; a prompt, and heads that were left out, more.
            window = 1 + num_draft
            self.static = StaticSteps(step, len(prompts), window, max_len, weight.device, record)
        self.positions = Positions(model, len(prompts), max_len)
        self.caches = [LayerCache(block, self.positions) for block in model.layers.values()]
        self.drafter = build_drafter(model, self.positions, num_draft) if num_draft else None
        tokens = torch.zeros(len(prompts), max_len + num_draft + 1, dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.tokens = to_device(tokens, weight.device)
        self.last = [len(prompt) - 1 for prompt in prompts]

    def prefill(self) -> list[list[int]]:
        """Run the trunk over the prompts, in one forward; each row's first new token [B][1]."""
        longest = max(self.last) + 1
        h = self.trunk(self.positions.span([0] * len(self.last), longest))
        logits = self.model.output(take(h, self.last))  # [B, 1, V]
        target = self.sampler.verify(logits, self.tokens[:, :0], None, self.plan(0).noise)  # [B, 1]
        self.tokens[self.positions.index(advance(self.last, 1), 1)] = target
        return target.tolist()

    def run(self, plan: Plan) -> Tensor:
        """A step: `predict_and_verify`, in static shapes where it can be."""
        if self.static is None or plan.window > self.static.window:
            with sdpa_kernel(WITHOUT_PLANS):
                return predict_and_verify(self, plan)
        return self.static.run(plan)

    def plan(self, count: int) -> Plan:
        """A step with `count` drafts from where the text is now."""
        window = self.drafter.lengths.window(self.last, count) if self.drafter else 0
        vocab = self.model.tok_embeddings.num_embeddings
        noise = self.sampler.noise(len(self.last), count, vocab, self.tokens.device)
        return Plan(self.last, count, window, noise)

    def predict(self, plan: Plan) -> Tensor | None:
        """Draft with heads 2 .. count + 1, as `ParallelDrafter.draft`."""
        if self.drafter is None or not plan.drafts:
            return None
        return self.drafter.draft(self.tokens, plan, self.sampler)

    def verify(self, plan: Plan, q: Tensor | None) -> Tensor:
        """t[p+1] and the drafts after it, and head 1's choice after each: [2, B, 1 + drafts]."""
        span = self.positions.span(advance(plan.last, 1), 1 + plan.drafts, plan.keys)
        fed = self.tokens[span.where]  # [B, 1 + drafts]
        target = self.sampler.verify(self.model.output(self.trunk(span)), fed[:, 1:], q, plan.noise)
        both = torch.stack((fed, target))  # before `fed`, which may be a view, is written to
        # Accepted drafts stay as they are, head 1's choice comes next; the rest does not count.
        self.tokens[shift_index(span.where, 1)] = target
        return both

    def accept(self, grown: Sequence[int]) -> None:
        """Row b's text has `grown[b]` more tokens."""
        self.last = [p + new for p, new in zip(self.last, grown, strict=True)]

    def trunk(self, span: Span) -> Tensor:
        """Embedding, layers (the last one is head 1's) and final norm: head 1's h [B, size, D].
        What the drafting heads need of it is kept."""
        caches = [cache.at(span) for cache in self.caches]
        z, x = self.model.forward_span(self.tokens, span.where, span.context, caches)
        h = self.model.norm(x)
        if self.drafter is not None:
            self.drafter.states[span.where] = {"z": z, "raw": x, "h": h}[self.drafter.reads]
        return h


def predict_and_verify(decoder: Decoder, plan: Plan) -> Tensor:
    """One step up to the host's part in it: as `Decoder.verify`."""
    return decoder.verify(plan, decoder.predict(plan))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A whole step as one graph: with caches of a fixed length, all of which is attended to under a
    mask, every step with as many drafts looks alike to a compiler (the static shapes of gpt-fast).
    Prompts and catching up come in every length and run as they are."""
    # Sizes of a batch, numbers of drafts, lengths: more than the 8 variants that torch stops at.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, dynamic=False)


@torch.inference_mode()
def states_of(model: Trunk, texts: Sequence[Sequence[int]]) -> Tensor:
    """Head 1's states [B, S, D] at the tokens of B texts, of which the longest has S."""
    check(model, texts, 1)
    decoder = Decoder(model, texts, 1, 0, Sampler())
    return decoder.trunk(decoder.positions.span([0] * len(texts), max(map(len, texts))))


@torch.inference_mode()
def next_logits(model: Trunk, text: Sequence[int]) -> Tensor:
    """Head 1's logits [V] for the token after `text`."""
    return model.output(states_of(model, [text])[0, -1])


def most_drafts(model: Trunk, num_draft: int | Literal["auto"] | None) -> int:
    """The most tokens that a step drafts: `num_draft`, or all that the heads can."""
    if model.mtp is None:
        raise UserError(
            "speculative decoding drafts with heads 2..n, but this model has head 1 alone; train "
            'it with "mtp" in model.converters, or decode without'
        )
    most = model.spec.num_future_tokens - 1
    if num_draft is None or num_draft == "auto":
        return most
    if not 1 <= num_draft <= most:
        raise UserError(f"num_draft = {num_draft}: this model's heads draft 1 to {most} tokens")
    return num_draft


def check(model: Trunk, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """UserError where there is nothing to continue, or nothing to continue it with."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("the prompt is empty: give at least one token to go on from")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: expected 1 or more")
    vocab = model.tok_embeddings.num_embeddings
    if wrong := [t for prompt in prompts for t in prompt if not 0 <= t < vocab]:
        raise UserError(
            f"the prompt has token {wrong[0]}, but the model's vocabulary is 0 to {vocab - 1}; "
            "use the tokenizer that it was trained with"
        )
