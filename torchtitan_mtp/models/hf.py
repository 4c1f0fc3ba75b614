"""Any decoder of transformers as a trunk: its own code and its own parameter names, behind the
interface of `Trunk`.

What a head needs of a model is in the middle of its forward: the state before or after the last
layer, and what the model hands to each layer beside it (positions, masks). No model offers these,
so its forward runs with taps (`taps.py`) in the place of the last layer and the final norm.
Embedding scales, masks, windows, experts stay the model's own business; one that does something
around its layers which heads would miss is refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.attention import KVCache
from torchtitan_mtp.models.heads import TrunkOutput, TrunkParts
from torchtitan_mtp.models.hf_config import document_masks, error_line, transformers
from torchtitan_mtp.models.hf_spans import HFSpan, HFSpans, SpanCache
from torchtitan_mtp.models.init import copy_full_tensor, seed_of
from torchtitan_mtp.models.layers import NormParams, normalize
from torchtitan_mtp.models.taps import Arguments, Around, Tap, probe, with_parts
from torchtitan_mtp.models.trunk import Trunk, Unembedding

_NORMS = ("norm", "final_layernorm", "embedding_norm", "ln_f", "final_norm", "final_layer_norm")
_LAYERS = ("layers", "h", "blocks")
_ALIGNED = 8  # widths of experts in torch's grouped products: 16 bytes, of bfloat16 too


class HFContext(NamedTuple):
    """A `BlockContext`: what heads get, as the layer that they copy; and the last layer, which may
    be of another kind (with a sliding window)."""

    heads: Arguments
    last: Arguments
    last_layer: tuple[nn.Module]

    def run(
        self, block: nn.Module, x: Tensor, cache: Any = None, norm: NormParams | None = None
    ) -> Tensor:
        """As `BlockContext.run`."""
        arguments = self.last if block is self.last_layer[0] else self.heads
        changed = {} if cache is None else {"past_key_values": SpanCache(lambda _: cache)}
        return block(x, *arguments.args, norm=norm, **arguments.kwargs | changed)


class _Normed:
    """Mixed into the class of a model's layers: a call may end with a norm (`BlockContext.run`)."""

    def forward(self, *args: Any, norm: NormParams | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        return out if norm is None else normalize(out, norm)


class Names(NamedTuple):
    """Of children: the model without its output, that one's layers and final norm, the output."""

    inner: str
    layers: str
    norm: str
    output: str


def _causal_model(config: Any) -> tuple[Any, Names]:
    """transformers' model of a config on the meta device, with an `Unembedding`.

    Raises:
        UserError: no language model, or one that is built in another way.
    """
    kind = f"config.json: model_type = {config.model_type!r}"
    package = transformers(kind)
    if type(config) not in package.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{kind}: transformers has no causal language model of it")
    try:
        with torch.device("meta"):
            causal = package.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # a value that some part of it does not know
        what = f"transformers can't build it: {type(error).__name__}: {error_line(error)}"
        raise UserError(f"{kind}: {what}") from error
    for name, param in causal.named_parameters():
        if param.numel() == 0:
            raise UserError(f"{kind}: its sizes leave {name} empty, {tuple(param.shape)}")
    base, head = causal.base_model_prefix, causal.get_output_embeddings()
    inner = getattr(causal, base, None)
    layers = [n for n in _LAYERS if isinstance(getattr(inner, n, None), nn.ModuleList)]
    norms = [n for n in _NORMS if isinstance(getattr(inner, n, None), nn.Module)]
    outputs = [n for n, child in causal.named_children() if child is head]
    if not (layers and norms and outputs and isinstance(head, nn.Linear)):
        raise UserError(
            f"{kind}: {type(causal).__name__} has no list of layers, final norm and linear output "
            f"by names known here ({', '.join(_LAYERS)}; {', '.join(_NORMS)})"
        )
    if head.bias is not None:
        raise UserError(f"{kind}: its output has a bias, which the loss here does not know")
    if (count := len(getattr(inner, layers[0]))) != (said := config.num_hidden_layers):
        what = f"num_hidden_layers = {said} in a list of {count}; expected one attention a layer"
        raise UserError(f"{kind}: {what}")
    output = Unembedding(*head.weight.shape[::-1], bias=False, device="meta")
    setattr(causal, outputs[0], output)
    experts = (module for module in causal.modules() if hasattr(module, "is_transposed"))
    stacks = (param for module in experts for param in module.parameters() if param.ndim == 3)
    if any(width % _ALIGNED for stack in stacks for width in stack.shape[1:]):
        causal.set_experts_implementation("eager")
    return causal, Names(base, layers[0], norms[0], outputs[0])


class HFTrunk(Trunk):
    """A model `AutoModelForCausalLM` makes of a config, on the meta device.

    config: of transformers. args: the sizes that others here ask for.

    Raises:
        UserError: a model that does around its layers what heads can't do with it.
    """

    native_blocks = False
    causal: Any  # the model of transformers; the modules are this one's, too
    around: Around

    def __init__(self, config: Any, args: ModelArgs, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = ModelSpec(args, hf_config=config.to_diff_dict())
        causal, self._names = _causal_model(config)
        # No module of this one: its modules are, under their own names.
        self.__dict__["causal"] = causal
        for name, child in causal.named_children():
            self.add_module(name, child)
        self.layers_name = f"{self._names.inner}.{self._names.layers}"
        for layer in self.layers.values():
            layer.__class__ = type(type(layer).__name__, (_Normed, type(layer)), {})
        for param in self.parameters():  # buffers keep their type: angles are float32
            param.data = param.data.to(dtype)
        self.tie_weights()
        self.mtp = None
        self.around = probe(causal, *self._names)
        self.output.scale = self.around.logit_scale
        self.softcap = self.around.softcap
        if args.attn_mask_type == "block_causal" and not self.around.documents_by:
            raise UserError(
                f'model.attn_mask_type = "block_causal": {type(causal).__name__} of transformers '
                'can\'t keep packed documents apart; set "causal"'
            )
        self.train()

    def train(self, mode: bool = True) -> HFTrunk:
        """Never in transformers' training mode, in which some models draw random numbers (dropout,
        a router's noise): every forward and its recomputation are the same."""
        return super().train(False)

    @property
    def inner(self) -> Any:
        """The model without its output."""
        return getattr(self, self._names.inner)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """As `Trunk.layers`."""
        return {str(i): layer for i, layer in enumerate(getattr(self.inner, self._names.layers))}

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        """As `Trunk.norm`."""
        return getattr(self.inner, self._names.norm)

    @property
    def tok_embeddings(self) -> nn.Embedding:  # type: ignore[override]
        """As `Trunk.tok_embeddings`."""
        return self.inner.get_input_embeddings()

    @property
    def output(self) -> Unembedding:  # type: ignore[override]
        """As `Trunk.output`."""
        return getattr(self, self._names.output)

    @property
    def output_name(self) -> str:
        """The name of `output` among the parameters."""
        return self._names.output

    def parts(self) -> TrunkParts:
        """As `Trunk.parts`: heads copy the last layer with full attention."""
        layers = list(self.layers.values())
        return TrunkParts(
            self.args,
            layers[-1],
            self.norm,
            layers[self.head_layer],
            functools.partial(copy.deepcopy, self.norm),
        )

    @functools.cached_property
    def head_layer(self) -> int:
        """The number of the layer that heads copy: the last of the kind that config.json has for
        modules (`mtp_layer_types`), else the last with full attention."""
        config, alike = self.causal.config, list(range(len(self.layers)))
        for key, usual in (("layer_types", "full_attention"), ("mlp_layer_types", None)):
            kinds = getattr(config, key, None) or []
            wanted = (getattr(config, f"mtp_{key}", None) or [usual])[0]
            alike = [i for i in alike if wanted in kinds[i : i + 1]] or alike
        return alike[-1]

    def embed(self, tokens: Tensor) -> Tensor:
        """As `Trunk.embed`."""
        return self._scaled(self.tok_embeddings(tokens))

    def _scaled(self, x: Tensor) -> Tensor:
        scale = self.around.embedding_scale
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype, device=x.device)

    def _forward_trunk(self, batch: Batch, state: Tensor | None = None) -> TrunkOutput:
        x, embedded = self._embedded(batch)
        inputs: dict[str, Any] = {"position_ids": batch.positions, "use_cache": False}
        if self.args.attn_mask_type == "block_causal":
            inputs["position_ids"] = _within_documents(batch.positions, batch.doc_ids)
            if self.around.documents_by == "masks":
                masks = document_masks(self.causal.config, x, inputs["position_ids"])
                inputs["attention_mask"] = masks
        below = self.mtp is not None and self.mtp.reads_before_last_layer
        state, context = self.run(x, below, **inputs)
        return TrunkOutput(state, context, None if embedded is None else self._scaled(embedded))

    def run(
        self, x: Tensor, below_last: bool = False, dry: bool = False, **inputs: Any
    ) -> tuple[Tensor, HFContext]:
        """The model's forward on embeddings x [B, S, D], up to its final norm or `below_last` its
        last layer: the state there [B, S, D], and what layers got; if `dry`, without any layer."""
        layers: list[Any] = list(self.layers.values())
        last_layer = layers[-1]
        if dry:
            layers = [Tap(layer, runs=False) for layer in layers]
        at = self.head_layer
        layers[at] = heads = Tap(layers[at], runs=not (below_last and at == len(layers) - 1))
        last = heads
        if at != len(layers) - 1:
            layers[-1] = last = Tap(layers[-1], runs=not below_last)
        final = Tap(self.norm, runs=False)
        with_parts(self.inner, {self._names.layers: layers, self._names.norm: final})(
            inputs_embeds=x, **inputs
        )
        assert final.state is not None
        return final.state, HFContext(heads.arguments, last.arguments, (last_layer,))

    # ------------------------------------------------------------- decoding

    def spans(self, max_len: int) -> HFSpans:
        """As `Trunk.spans`."""
        return HFSpans(self, max_len)

    def forward_span(
        self, text: Tensor, where: Any, context: HFSpan, caches: Sequence[KVCache]
    ) -> tuple[Tensor, Tensor]:
        """As `Trunk.forward_span`."""
        whole, cache = context.spans.whole, SpanCache(caches.__getitem__)
        inputs = {"use_cache": False} if whole else context.inputs | {"past_key_values": cache}
        x = self.tok_embeddings(text[:, : context.end] if whole else text[where])
        z, layers = self.run(x, below_last=True, **inputs)
        x = layers.run(layers.last_layer[0], z)
        return (z[where], x[where]) if whole else (z, x)

    # ------------------------------------------------------------- weights

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As `Trunk.init_weights`: each module is drawn whole, as transformers has it, from a
        random stream of its name, and every rank keeps its shard. Matrices that transformers leaves
        as they were made (some routers) are drawn with its `initializer_range`, and a projection of
        a head that is not transformers' with the head's `init_std`."""
        self.init_buffers()
        for name, module in self.named_modules():
            params = dict(module.named_parameters(recurse=False))
            if not params:
                continue
            device = next(iter(params.values())).device
            with torch.random.fork_rng([device] if device.type != "cpu" else []):
                torch.manual_seed(seed_of(name, seed))
                whole = self._drawn(name, module, device)
            for key, param in params.items():
                copy_full_tensor(param, whole[key].to(param.dtype))

    def _drawn(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Whole parameters of a module, without those of its children."""
        std = getattr(self.causal.config, "initializer_range", 0.02)
        head = name.split(".")[:3] if name.startswith("mtp.") else []
        owner: Any = self.get_submodule(".".join(head)) if head else None
        own = owner is not None and not isinstance(owner, _Normed) and type(module) is nn.Linear
        if own and not name.startswith(".".join((*head, "block."))):
            std = owner.init_std(f"{name.partition('.'.join(head) + '.')[2]}.weight")
            return {"weight": std * torch.randn(module.weight.shape, device=device)}  # type: ignore
        whole = _materialised(module, device)
        self.causal._init_weights(whole)
        for param in whole.parameters(recurse=False):
            if param.isnan().any():  # as it was
                param.normal_(0.0, std) if param.ndim > 1 else param.zero_()
        return dict(whole.named_parameters(recurse=False))

    @torch.no_grad()
    def init_buffers(self) -> None:
        """As `Trunk.init_buffers`: transformers computes what is not stored of a model.

        Raises:
            UserError: it does not, for one of them.
        """
        for name, module in self.named_modules():
            buffers = dict(module.named_buffers(recurse=False))
            if not buffers:
                continue
            whole = _materialised(module, next(iter(buffers.values())).device)
            self.causal._init_weights(whole)
            for key, buffer in whole.named_buffers(recurse=False):
                unset = buffer.is_floating_point() and buffer.isnan().any()
                if unset and key in module._non_persistent_buffers_set:
                    raise UserError(f"{name}.{key}: transformers does not say what is in it")
                module._buffers[key] = torch.zeros_like(buffer) if unset else buffer


def _materialised(module: nn.Module, device: torch.device) -> Any:
    """A module of the same kind with memory of its own, whole, but for its children; NaN is in all
    of it that can hold NaN."""
    whole: Any = object.__new__(type(module))  # whatever FSDP2 makes of its class
    whole.__dict__ = dict(module.__dict__)
    whole._modules = {}
    for own, tensors in (("_parameters", module._parameters), ("_buffers", module._buffers)):
        made: dict[str, Any] = {}
        for key, tensor in tensors.items():
            made[key] = None
            if tensor is not None:
                dtype = torch.float32 if own == "_parameters" else tensor.dtype
                made[key] = torch.zeros(tensor.shape, dtype=dtype, device=device)
                if dtype.is_floating_point:
                    made[key].fill_(torch.nan)
                if own == "_parameters":
                    made[key] = nn.Parameter(made[key])
        setattr(whole, own, made)
    return whole


def _within_documents(positions: Tensor, doc_ids: Tensor) -> Tensor:
    """Positions [B, S] that start at 0 in each document: by these transformers knows documents."""
    starts = torch.diff(doc_ids, dim=1, prepend=doc_ids[:, :1] - 1) != 0
    return positions - torch.where(starts, positions, 0).cummax(dim=1).values
