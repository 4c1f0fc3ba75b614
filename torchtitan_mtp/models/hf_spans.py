"""Decoding with a trunk of transformers: what its model is called with for a few positions of every
row, whose earlier keys and values are in this project's caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.attention import KVCache
from torchtitan_mtp.models.layers import NormParams

_FULL, _SLIDING = "full_attention", "sliding_attention"


class SpanCache:
    """As much of a transformers `Cache` as attention asks for: each layer's is one of ours."""

    def __init__(self, of_layer: Callable[[int], KVCache]) -> None:
        self.of_layer = of_layer

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Store k, v [B, KV, size, hd]; what there is to attend to, [B, KV, end, hd] each."""
        return self.of_layer(layer_idx)(k, v)


class HFSpan:
    """A `BlockContext` of some positions, for the heads. inputs: what the model is called with."""

    def __init__(self, spans: HFSpans, inputs: dict[str, Any], end: int) -> None:
        self.spans, self.inputs, self.end = spans, inputs, end
        self._context: Any = None

    def run(
        self, block: nn.Module, x: Tensor, cache: Any = None, norm: NormParams | None = None
    ) -> Tensor:
        """As `BlockContext.run`. Error: a block that keeps more than keys and values."""
        if self._context is None:
            if (kind := self.spans.head_kind) not in (_FULL, _SLIDING):
                raise UserError(
                    f"speculative decoding: heads are layers of {kind} here, whose state of "
                    "rejected drafts can't be taken back; decode without"
                )
            run = self.spans.trunk.run
            self._context = run(x, dry=True, use_cache=False, **self.inputs)[1]
        return self._context.run(block, x, cache, norm)


class HFSpans:
    """Makes spans of positions before max_len, with masks as transformers' function
    `create_masks_for_generate` has them, but for each row.

    whole: the layers keep something else than keys and values, or keys that change later, so that
    the trunk runs over all positions each time.
    """

    def __init__(self, trunk: Any, max_len: int) -> None:
        self.trunk, config = trunk, trunk.causal.config
        self.all = torch.arange(max_len, device=trunk.tok_embeddings.weight.device)
        kinds = getattr(config, "layer_types", None) or []
        self.kinds, self.window = set(kinds), getattr(config, "sliding_window", None)
        recurrent, chunk = trunk.causal._is_stateful, getattr(config, "attention_chunk_size", None)
        kinds = kinds or ["a recurrent kind" if recurrent else _FULL] * (trunk.head_layer + 1)
        self.head_kind = kinds[trunk.head_layer]
        other = recurrent or chunk is not None or not set(kinds) <= {_FULL, _SLIDING}
        self.whole = other or max_len > _fixed_frequencies(config)

    def __call__(self, where: Any, size: int, end: int, mask: Callable[..., Tensor]) -> HFSpan:
        """As `Trunk.spans`."""
        slides = _SLIDING in self.kinds if self.kinds else self.window is not None
        masks: Any = mask(self.window if slides else None)
        if slides and len(self.kinds) > 1:
            masks = dict.fromkeys(self.kinds) | {_FULL: mask(), _SLIDING: masks}
        at = self.all[where].view(-1, size)
        return HFSpan(self, {"position_ids": at, "attention_mask": masks}, end)


def _fixed_frequencies(config: Any) -> float:
    """Up to which length rotary frequencies, and so the keys, do not depend on the length."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope, *(value for value in rope.values() if isinstance(value, dict))
    changing = [told for told in kinds if told.get("rope_type") in ("dynamic", "longrope")]
    key = "original_max_position_embeddings"
    return min((t.get(key) or config.max_position_embeddings for t in changing), default=math.inf)
