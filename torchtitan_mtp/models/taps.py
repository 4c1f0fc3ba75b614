"""Taps: what passes between the layers of a model that offers no look inside.

A model's forward runs on a copy of the model object (the same weights) in which some layers, or the
final norm, are taps: they note what they are called with. `probe` finds out in this way, once, on
random numbers, what a model does around its layers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.hf_config import document_masks, error_line


class Arguments(NamedTuple):
    """What a model hands to a layer beside its input."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Tap:
    """In the place of a layer, whose attributes it has: notes what it is called with."""

    def __init__(self, layer: nn.Module, runs: bool) -> None:
        self.layer, self.runs = layer, runs
        self.state: Any = None  # a tensor [B, S, D]
        self.arguments = Arguments((), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            self.state, *rest = args
        else:
            rest, self.state = [], kwargs.pop("hidden_states")
        self.arguments = Arguments(tuple(rest), kwargs)
        return self.layer(self.state, *rest, **kwargs) if self.runs else self.state


def with_parts(model: nn.Module, parts: dict[str, Any]) -> Any:
    """The same model object, but for some of its children."""
    other = copy.copy(model)
    other.__dict__ = dict(model.__dict__)
    other._modules = {key: child for key, child in model._modules.items() if key not in parts}
    other.__dict__.update(parts)
    return other


@dataclass(frozen=True)
class Around:
    """What a model does around its layers: factors of its embeddings and of its logits, and the
    soft cap of the latter; by what it masks packed documents, if it does: by positions that start
    again, or by masks of each kind of layer that it is given."""

    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    documents_by: Literal["positions", "masks", ""] = ""


@torch.no_grad()
def probe(causal: Any, base: str, layers: str, norm: str, output: str) -> Around:
    """What a model does around its layers, measured on random numbers, without its weights.

    Raises:
        UserError: something between layers, or of its embeddings or logits more than `Around` says.
    """
    inner, kind = getattr(causal, base), type(causal).__name__
    embedding = inner.get_input_embeddings()
    width, generator = embedding.weight.shape[1], torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    taps = [_Sender(layer, draw(1, 3, width)) for layer in getattr(inner, layers)]
    parts: dict[str, Any] = {layers: taps}
    for name, child in inner.named_children():
        if name == layers or child is embedding:
            continue
        parts[name] = whole = copy.deepcopy(child).to_empty(device="cpu").float()
        for module in whole.modules():
            causal._init_weights(module)
        if name != norm and any(True for _ in child.parameters()):
            raise UserError(f"{kind}: has weights in {name}, beside its layers; heads miss these")
    vocab = nn.Linear(width, 7, bias=False)
    # Logits as large as caps are, so that these show.
    vocab.weight.copy_(20 * draw(7, width) / math.sqrt(width))
    x = draw(1, 3, width)
    model = with_parts(causal, {base: with_parts(inner, parts), output: vocab})
    try:
        logits = model(inputs_embeds=x, use_cache=False).logits.float()
    except Exception as error:
        why = _why_not(inner, model, taps, x) or f"can't be run layer by layer: {error_line(error)}"
        raise UserError(f"{kind}: {why}") from error
    first = taps[0].state
    for tap, after in itertools.pairwise(taps):
        if not torch.equal(tap.sent, after.state):
            raise UserError(f"{kind}: does something between its layers, which heads would miss")
    documents_by = _documents_by(causal.config, with_parts(inner, parts), taps, x)
    plain = vocab(parts[norm](taps[-1].sent))
    embedding_scale, logit_scale = _ratio(first, x), _ratio(logits, plain)
    cap = getattr(causal.config, "final_logit_softcapping", None)
    if embedding_scale is None:
        raise UserError(f"{kind}: does more with its embeddings than to scale them")
    if logit_scale is not None:
        return Around(embedding_scale, logit_scale, None, documents_by)
    if cap is None or not torch.allclose(logits, cap * torch.tanh(plain / cap), rtol=1e-4):
        raise UserError(f"{kind}: does more with its logits than to scale or cap them")
    return Around(embedding_scale, 1.0, cap, documents_by)


def _why_not(inner: Any, model: Any, taps: Sequence[_Sender], x: Tensor) -> str:
    """What in a model can't be run layer by layer; "" where that isn't known."""
    if own := [name for name, _ in inner.named_buffers(recurse=False)]:
        return f"has {', '.join(own)} beside its layers, which is not served here"
    for tap in taps:
        tap.sent = (tap.sent, None)
    with contextlib.suppress(Exception):  # of another cause
        model(inputs_embeds=x, use_cache=False)
        return "its layers return tuples, and heads, which are layers, need states alone"
    return ""


def _documents_by(
    config: Any, inner: Any, taps: Sequence[Tap], x: Tensor
) -> Literal["positions", "masks", ""]:
    """`Around.documents_by`, for two documents in x [1, 3, D], the second of its last token."""
    positions = torch.tensor([[0, 1, 0]])
    masks = document_masks(config, x, positions)
    ways: dict[Literal["positions", "masks"], Any] = {"positions": None, "masks": masks}
    for name, given in ways.items():
        try:
            inner(inputs_embeds=x, attention_mask=given, position_ids=positions, use_cache=False)
        except Exception:  # a model that takes no such masks fails in a way of its own
            continue
        found = [tap.arguments.kwargs.get("attention_mask") for tap in taps]
        if all(_separates(mask) for mask in found):
            return name
    return ""


def _separates(mask: Any) -> bool:
    """Whether the third token of three may not see the first two: False, or a large subtrahend."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return False
    row = mask[0, 0, 2]
    seen = row if row.dtype == torch.bool else row > -1e4
    return seen.tolist() == [False, False, True]


class _Sender(Tap):
    """A tap that returns something else."""

    def __init__(self, layer: nn.Module, sent: Tensor) -> None:
        super().__init__(layer, runs=False)
        self.sent: Any = sent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        return self.sent


def _ratio(found: Tensor, plain: Tensor) -> float | None:
    """c where found = c * plain, to float32's accuracy; None where there is none."""
    ratio = (found * plain).sum().item() / (plain * plain).sum().item()
    near = torch.allclose(found, ratio * plain, rtol=1e-4, atol=1e-5)
    if not near:
        return None
    whole = float(round(ratio))
    return whole if abs(ratio - whole) < 1e-6 * whole else ratio
