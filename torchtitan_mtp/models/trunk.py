"""What every trunk is to those above it: heads, engines, FSDP2, checkpoints and decoding see a
`Trunk`, and not whose code computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.attention import KVCache
from torchtitan_mtp.models.context_parallel import CHUNKS, ContextParallel, gather
from torchtitan_mtp.models.heads import BlockContext, Heads, TrunkOutput, TrunkParts
from torchtitan_mtp.models.moe import MoE
from torchtitan_mtp.ops import HeadByHeadLoss, LossOutput, VocabularyShard, chunked_argmax


class Unembedding(nn.Linear):
    """The shared `output` projection. As of any linear layer, a call gives logits [..., V].

    Whatever else uses its weight is a method here, registered with FSDP2 (`apply_fsdp`): FSDP2
    unshards a weight only for a forward of the module that owns it, and loses the gradient of a
    use outside. scale: a factor of the logits (Granite's, Cohere's).

    vocabulary: the ranks of tensor parallelism, if any. This one has some rows of the weight and
    pieces [B, S / ranks, D] of the states [B, S, D] that the methods are named with.
    """

    scale = 1.0
    vocabulary: VocabularyShard | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., V]. Error: no rank has all of the vocabulary."""
        if self.vocabulary is not None:
            raise UserError(
                "logits of the whole vocabulary, which is spread over the ranks of "
                "parallelism.tensor_parallel_degree; set it to 1, or ask for `loss` or `argmax`"
            )
        return super().forward(self._scaled(x))

    def loss(
        self,
        hiddens: Sequence[Tensor],
        labels: Tensor,
        compute: Callable[..., LossOutput],
        detach: bool = False,
    ) -> LossOutput:
        """The loss of n heads: `compute` of n tensors [N, D], the weight, labels [N, n] and the
        `vocabulary` of which the weight has rows.

        hiddens: n tensors [B, S, D]; labels [B, S, n]. `detach`: the weight gets no gradient.
        """
        weight = self._own_rows().detach() if detach else self._own_rows()
        rows = [self._scaled(self.gather(h).flatten(0, 1)) for h in hiddens]
        return compute(rows, weight, labels.flatten(0, 1), vocabulary=self.vocabulary)

    def argmax(self, hiddens: Sequence[Tensor]) -> Tensor:
        """The most likely tokens [B, S, n] int64 of n tensors [B, S, D], without gradients."""
        weight, best = self._own_rows(), []
        for hidden in hiddens:
            rows = self.gather(hidden)
            found = chunked_argmax(rows.flatten(0, 1), weight, vocabulary=self.vocabulary)
            best.append(found.view(rows.shape[:2]))
        return torch.stack(best, dim=-1)

    def gather(self, x: Tensor) -> Tensor:
        """x [B, S, ...] of the pieces that the ranks of the vocabulary have; without any, x."""
        return x if self.vocabulary is None else gather(x, self.vocabulary.group)

    def _own_rows(self) -> Tensor:
        """The weight, or what this rank has of it [V / ranks, D]."""
        if self.vocabulary is None or not isinstance(self.weight, DTensor):
            return self.weight
        return self.weight.to_local()

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1.0 else x * self.scale


class Trunk(nn.Module):
    """A decoder-only language model with a slot, `mtp`, for the multi-token-prediction transform
    (`torchtitan_mtp.mtp`). Its parameters keep their names whatever the slot holds.

    layers: its blocks by number; their names begin with `layers_name`. softcap: of the logits;
    whoever uses these applies it. whole: of a stage of a pipeline, which lacks some of the modules,
    the names of the whole model's tensors, each with all names of the same one.
    """

    spec: ModelSpec
    mtp: Heads | None
    tok_embeddings: nn.Embedding
    layers: Any  # a mapping of blocks by number
    norm: nn.Module
    output: Unembedding
    layers_name = "layers"
    softcap: float | None = None
    whole: Mapping[str, Collection[str]] | None = None
    context_parallel: ContextParallel | None = None  # the ranks that sequences are spread over
    tensor_ranks = 1  # that share the work on the same tokens, each with a part of the positions
    native_blocks = True  # this project's: in decoding, several run as one, and steps are compiled

    @property
    def args(self) -> ModelArgs:
        """The trunk's sizes."""
        return self.spec.args

    def parts(self) -> TrunkParts:
        """What heads are built from."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> [B, S, D], as the first block reads them."""
        return self.tok_embeddings(tokens)

    def _embedded(self, batch: Batch, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embeddings of a batch's tokens [B, S, D], and where heads read them, of these and the
        tokens after them (`TrunkOutput.embedded`). A `state` that is given stands for the first."""
        if self.mtp is None or not self.mtp.reads_future_tokens:
            return self.tok_embeddings(batch.tokens) if state is None else state, None
        # Each token once, although up to n heads read it: what is contiguous is so with the n - 1
        # tokens after it.
        pieces = 1 if self.context_parallel is None else CHUNKS
        pieces = math.lcm(pieces, self.tensor_ranks)  # of which each of these ranks keeps as many
        tokens, after = (
            x.unflatten(1, (pieces, batch.tokens.shape[1] // pieces))
            for x in (batch.tokens, batch.future_tokens)
        )
        length = tokens.shape[2]
        embedded = self.tok_embeddings(torch.cat((tokens, after[:, :, -1]), dim=2))
        if state is None:
            state = embedded[:, :, :length].flatten(1, 2).contiguous()
        return state, embedded

    def trunk_layers(self) -> list[Any]:
        """The blocks that `forward_trunk` runs: without the last one, where that is head 1."""
        layers = list(self.layers.values())
        return layers[:-1] if self.mtp is not None and self.mtp.reads_before_last_layer else layers

    def _forward_trunk(self, batch: Batch, state: Tensor | None = None) -> TrunkOutput:
        raise NotImplementedError

    def forward_trunk(self, batch: Batch, state: Tensor | None = None) -> TrunkOutput:
        """The trunk alone, for an engine that runs the heads itself. state [B, S, D]: where the
        model is a later stage of a pipeline, what the stage before it gives."""
        with record_function("trunk"):
            return self._forward_trunk(batch, state)

    def forward(self, batch: Batch) -> list[Tensor]:
        """The hidden states of the n heads: n tensors [B, S, D], each normalised."""
        trunk = self._forward_trunk(batch)
        return [self.norm(trunk.state)] if self.mtp is None else self.mtp(trunk)

    def teach(self, head_loss: HeadByHeadLoss, state: Tensor) -> None:
        """Give the heads after head 1 its state [B, S, D] to learn from."""
        state = self.output.gather(state.detach())
        if self.context_parallel is None:
            return head_loss.teach(state)
        ahead = self.spec.num_future_tokens - 1
        head_loss.teach(self.context_parallel.with_following(state, ahead), ahead)

    def spans(self, max_len: int) -> Callable[..., BlockContext]:
        """For decoding, what makes the context of a span of positions before `max_len`: of
        (where, size, end, mask), as in `Span`, with mask(window) -> [B or 1, 1, size, end]."""
        raise NotImplementedError

    def forward_span(
        self, text: Tensor, where: Any, context: Any, caches: Sequence[KVCache]
    ) -> tuple[Tensor, Tensor]:
        """The states below and after the last layer [B, size, D] at text[where], of tokens
        [B, >= end]; context: of that span. caches: a layer's each."""
        raise NotImplementedError

    def init_weights(self, seed: int) -> None:
        """Fill all parameters and buffers, materialised and maybe sharded, as the seed has it."""
        raise NotImplementedError

    def init_buffers(self) -> None:
        """Fill the buffers that no checkpoint holds, on the device that they are on."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make `output` and `tok_embeddings` one parameter where the model ties them."""
        if self.args.tied_embeddings and self.output is not None:  # a stage may have none
            self.output.weight = self.tok_embeddings.weight

    def named_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every block with its name, the trunk's first: what AC, compile and FSDP2 wrap."""
        for i, block in self.layers.items():
            yield f"{self.layers_name}.{i}", block
        if self.mtp is not None:
            for j, head in enumerate(self.mtp.heads):
                yield f"mtp.heads.{j}", head

    def named_moe_layers(self) -> Iterator[tuple[str, MoE]]:
        """Every mixture of experts of this project with the name of its block, if any."""
        for name, block in self.named_blocks():
            yield from ((name, part) for part in block.modules() if isinstance(part, MoE))
