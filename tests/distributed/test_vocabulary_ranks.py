"""The loss of a vocabulary that is spread over gloo ranks, against whole logits in float64."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from spawn import run_ranks
from tests.allocations import most_alive
from tests.naive_loss import naive_loss
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Unembedding
from torchtitan_mtp.ops import (
    HeadByHeadLoss,
    LossOptions,
    VocabularyShard,
    chunked_argmax,
    linear_cross_entropy,
    token_losses,
)
from two_ranks import counted

N, D, V, HEADS = 24, 8, 32, 3  # on 3 ranks: 11, 11 and 10 tokens
SCALES = torch.tensor([0.1, 0.0, 0.7])
EVERY = {"z_loss": 1e-2, "softcap": 5.0, "label_smoothing": 0.1}
TABLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 1e-2},
    "soft cap": {"softcap": 5.0},
    "smoothing": {"label_smoothing": 0.1},
    "kl": {"target_loss": "kl"},
    "lk": {"target_loss": "lk", "target_weight": 0.6, "softcap": 5.0},
    "tv": {"target_loss": "tv", "target_weight": 0.6},
    "every": {**EVERY, "target_loss": "kl", "target_weight": 0.6},
}


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Hiddens, weight, labels (some ignored), row weights. Head k has no label in the last k rows,
    where its teacher ends; tokens 3, 20 and 31, on three ranks of 3, always tie."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    hiddens = [normal(N, D).to(dtype) for _ in range(HEADS)]
    weight = normal(V, D).to(dtype)
    weight[20] = weight[31] = weight[3]
    hiddens[0][:4] = 3 * weight[3]
    labels = torch.randint(V, (N, HEADS), generator=generator)
    labels[:4, 0] = torch.tensor([3, 20, 31, 5])
    labels[4::5] = -100
    for k in range(HEADS):
        labels[N - k :, k] = -100
    # Some labels are most likely, so that there is something correct.
    best = (hiddens[1].double() @ weight.double().T).argmax(1)
    labels[:10, 1] = torch.where(labels[:10, 1] == -100, labels[:10, 1], best[:10])
    return hiddens, weight, labels, torch.rand(N, HEADS, generator=generator)


def spread(weight: Tensor) -> tuple[Tensor, VocabularyShard]:
    """This rank's rows as a leaf, and which they are."""
    vocabulary = VocabularyShard.of(dist.group.WORLD, len(weight))
    rows = weight.chunk(dist.get_world_size())[dist.get_rank()]
    return rows.clone().requires_grad_(), vocabulary


def whole(weight: Tensor) -> Tensor:
    """Rows of all ranks, one after another."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, weight)
    return torch.cat(parts)


def over_ranks(hiddens: list[Tensor]) -> list[Tensor]:
    """The sum of the ranks' gradients of each."""
    gradients = [h.grad.clone() for h in hiddens if h.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return gradients


def assert_equal_to_whole(
    dtype: torch.dtype, options: dict[str, Any], passes: str, weighted: bool, ignored: bool
) -> None:
    """`linear_cross_entropy` and `HeadByHeadLoss` (in two calls) of this rank's rows."""
    hiddens, weight, labels, weights = problem(dtype)
    labels = torch.full_like(labels, -100) if ignored else labels
    row_weights = weights if weighted else None
    exact = [x.double().requires_grad_() for x in (*hiddens, weight)]
    teacher = hiddens[0] if "target_loss" in options else None
    expected = naive_loss(
        exact[:-1],
        exact[-1],
        labels,
        SCALES.double(),
        row_weights=weights.double() if weighted else None,
        teacher=None if teacher is None else teacher.double(),
        **options,
    )
    expected.loss.backward()
    own, vocabulary = spread(weight)
    leaves = [h.clone().requires_grad_() for h in hiddens]
    how = LossOptions(chunk_rows=7, passes=passes, **options)
    more = {"row_weights": row_weights, "teacher": teacher, "vocabulary": vocabulary}
    found = linear_cross_entropy(leaves, own, labels, SCALES, how, **more)
    found.loss.backward()
    close = partial(torch.testing.assert_close, check_dtype=False)
    exactly = (
        {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    )
    nearly = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    known = 4 if dtype == torch.float32 else 3  # (of rounded logits others are the largest)
    close(tuple(found)[:known], tuple(expected)[:known], **exactly)
    rights = [x.grad for x in exact]
    close([*over_ranks(leaves), whole(own.grad)], rights, **nearly)
    if weighted:
        return
    apart, own = [h.clone().requires_grad_() for h in hiddens], own.detach().requires_grad_()
    head_loss, outputs = HeadByHeadLoss(SCALES, how), []
    if teacher is not None:
        head_loss.teach(teacher)
    for heads in (slice(1, HEADS), slice(0, 1)):
        states = [h * 1 for h in apart[heads]]
        tensors = (states, own, labels[:, heads], heads.start, heads.start == 0, vocabulary)
        outputs.append(head_loss(*tensors))
        outputs[-1].loss.backward()
    close(outputs[0].loss + outputs[1].loss, expected.loss, **exactly)
    close([*over_ranks(apart), whole(own.grad)], rights, **nearly)


def equal_to_whole() -> None:
    for options in TABLE.values():
        assert_equal_to_whole(torch.float32, options, "eager", False, False)
    for weighted, ignored in ((True, False), (False, True)):
        assert_equal_to_whole(torch.float32, TABLE["every"], "eager", weighted, ignored)
    assert_equal_to_whole(torch.bfloat16, TABLE["every"], "eager", False, False)


def torch_compile(backend: str) -> None:
    """The op inside of a compiled function, and its passes compiled: as eager ones."""
    compiled = partial(torch.compile, fullgraph=True, backend=backend)
    hiddens, weight, labels, _ = problem()
    (own, vocabulary), leaf = spread(weight), hiddens[1].requires_grad_()
    every = {**TABLE["every"], "teacher": hiddens[0], "first": 1, "vocabulary": vocabulary}

    def loss(x: Tensor, rows: Tensor, passes: str = "eager") -> Tensor:
        y = labels[:, 1:2].clamp(min=0)
        return linear_cross_entropy([x * 2], rows, y, passes=passes, **every).loss

    outside, inside = compiled(loss), compiled(token_losses.traceable_token_losses)
    leaves = (leaf, own)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(outside(*leaves), leaves), expected)
    with mock.patch.object(token_losses, "compiled_token_losses", lambda _: inside):
        found = torch.autograd.grad(loss(*leaves, passes="compiled"), leaves)
    torch.testing.assert_close(found, expected)


def argmax() -> None:
    """Of logits with exact ties between ranks, and of such that are not finite."""
    hiddens, weight, labels, _ = problem()
    own, vocabulary = spread(weight)
    found = chunked_argmax(hiddens[0], own.detach(), 7, vocabulary)
    assert torch.equal(found, (hiddens[0] @ weight.T).argmax(1)) and found[:4].tolist() == [3] * 4
    out = linear_cross_entropy(hiddens[:1], own, labels[:, :1], vocabulary=vocabulary)
    alone = linear_cross_entropy(hiddens[:1], weight, labels[:, :1])
    assert out.correct == alone.correct
    hidden, weight = torch.ones(3, 1), torch.zeros(6, 1)
    for bad in (torch.nan, torch.inf):
        weight[4] = bad
        own, vocabulary = spread(weight)
        assert chunked_argmax(hidden, own, None, vocabulary).tolist() == [4, 4, 4]
        out = linear_cross_entropy([hidden], own, torch.full((3, 1), 1), vocabulary=vocabulary)
        assert out.loss.isnan() and out.correct == 0


def costs() -> tuple[Counter[str], Counter[str], int]:
    """Reductions of three chunks, without a teacher and with one; and the peak in bytes."""
    hiddens, weight, labels, _ = problem()
    own, vocabulary = spread(weight)
    counts = []
    for more in ({}, {"target_loss": "lk", "teacher": hiddens[0]}):
        how = {"chunk_rows": 8, "vocabulary": vocabulary, **more}
        with counted(funcol, "all_reduce", what=lambda x, op, _: f"{op} {list(x.shape)}") as found:
            linear_cross_entropy(hiddens[:1], own, torch.ones_like(labels[:, :1]), first=1, **how)
        counts.append(found)
    hidden, weight = torch.randn(512, 4), torch.randn(3000, 4)
    own, vocabulary = spread(weight)
    y = torch.zeros(512, 1, dtype=torch.int64)

    def step() -> None:
        linear_cross_entropy([hidden], own, y, chunk_rows=16, vocabulary=vocabulary)

    return counts[0], counts[1], most_alive(step)


def unembedding(rank: int) -> None:
    """`Unembedding` with a weight that is a DTensor, under FSDP2, over two micro-batches whose
    sequences are spread over the ranks: as one process."""
    size, labels = dist.get_world_size(), problem()[2].view(2, 12, HEADS)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("fsdp", "tp"))
    hiddens, weight, *_ = problem()
    states = [h.view(2, 12, D) for h in hiddens]
    alone, ours = (Unembedding(D, V, bias=False) for _ in range(2))
    alone.weight.data.copy_(weight)
    ours.weight = nn.Parameter(distribute_tensor(weight, mesh["tp"], [Shard(0)]))
    ours.vocabulary = VocabularyShard.of(mesh["tp"].get_group(), V)
    fully_shard(ours, mesh=mesh["fsdp"])
    for method in ("loss", "argmax"):
        register_fsdp_forward_method(ours, method)
    assert torch.equal(ours.argmax(pieces(states, rank)), alone.argmax(states))
    for turn in range(2):
        gradients = []
        for model, own in ((alone, states), (ours, pieces(states, rank))):
            head_loss = HeadByHeadLoss(SCALES, LossOptions(chunk_rows=7))
            leaves = [h.clone().requires_grad_() for h in own]
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(turn == 1)
            for k in reversed(range(HEADS)):
                compute = partial(head_loss, first=k, last=k == 0)
                model.loss([leaves[k] * 1], labels[..., k : k + 1], compute).loss.backward()
            gradients.append([leaf.grad for leaf in leaves])
        expected, found = gradients
        torch.testing.assert_close(found, pieces(expected, rank))
    grad = ours.weight.grad
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), alone.weight.grad)
    with pytest.raises(UserError, match="tensor_parallel_degree; set it to 1"):
        ours(states[0])


def pieces(states: list[Tensor], rank: int) -> list[Tensor]:
    return [h.chunk(dist.get_world_size(), dim=1)[rank] for h in states]


def refusals() -> None:
    with pytest.raises(UserError, match=r"a vocabulary of 4 tokens on 3 ranks, 2 to each, leaves"):
        VocabularyShard.of(dist.group.WORLD, 4)
    hiddens, weight, labels, _ = problem()
    own, vocabulary = spread(weight)
    with pytest.raises(UserError, match='"triton" and the vocabulary is spread over ranks'):
        linear_cross_entropy(hiddens, own, labels, passes="triton", vocabulary=vocabulary)


def everything(rank: int) -> tuple[Counter[str], Counter[str], int]:
    equal_to_whole()
    argmax()
    refusals()
    return costs()


def test_three_ranks_give_what_whole_logits_give() -> None:
    for plain, taught, peak in run_ranks(3, everything):
        assert plain == {"max [8, 2]": 3, "sum [8, 1]": 3}  # two a chunk
        assert taught == {"max [8, 3]": 3, "sum [8, 2]": 6}  # and a third
        assert peak < 512 * 1000 * 4  # of a rank's whole logits


def test_the_unembedding_of_two_ranks_under_fsdp() -> None:
    run_ranks(2, unembedding)


def test_it_compiles_without_graph_breaks() -> None:
    run_ranks(1, compiled_by, "aot_eager")


@pytest.mark.exhaustive
def test_inductor_compiles_it() -> None:
    run_ranks(2, compiled_by, "inductor", timeout=300)


def compiled_by(rank: int, backend: str) -> None:
    torch_compile(backend)
