"""Attention within documents: each form of the mask against the naive one, and how often it
compiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.small import ARGS, DEEPSEEK, small_model, small_window
from torchtitan_mtp.config import ActivationCheckpoint
from torchtitan_mtp.data.targets import Batch, list_documents, make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models import packed, transformer
from torchtitan_mtp.models.args import LatentArgs
from torchtitan_mtp.models.attention import attend
from torchtitan_mtp.models.packed import activate_flash_attention, block_mask, packed_mask

WIDTHS = (16, 16)


def naive_mask(doc_ids: Tensor) -> Tensor:
    """[B, S, S]: query i sees key j <= i of its own document."""
    batch, seq = doc_ids.shape
    mask = torch.zeros(batch, seq, seq, dtype=torch.bool)
    for b in range(batch):
        for i in range(seq):
            for j in range(i + 1):
                mask[b, i, j] = doc_ids[b, i] == doc_ids[b, j]
    return mask


def batch_of(doc_ids: Tensor) -> Batch:
    """Only its documents matter."""
    nothing = torch.empty(0)
    return Batch(nothing, nothing, nothing, nothing, doc_ids, list_documents(doc_ids))


def on_cuda(doc_ids: Tensor) -> Batch:
    """A batch that says it is on a GPU."""

    class OnCuda(Tensor):
        is_cuda = True

    return batch_of(doc_ids)._replace(doc_ids=doc_ids.as_subclass(OnCuda))


def test_dense_mask_on_a_cpu():
    doc_ids = small_window(3, 20).doc_ids
    mask = packed_mask(batch_of(doc_ids), WIDTHS, torch.float32, "varlen")
    assert isinstance(mask, Tensor) and mask.shape == (3, 1, 20, 20)
    assert torch.equal(mask[:, 0], naive_mask(doc_ids))
    assert mask.any(-1).all()  # every query, padding too, sees itself: no softmax over nothing


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attentions_mask_is_the_same():
    doc_ids = small_window(3, 40).doc_ids
    mask = block_mask(doc_ids)
    b, q, kv = torch.meshgrid(torch.arange(3), torch.arange(40), torch.arange(40), indexing="ij")
    assert torch.equal(mask.mask_mod(b, torch.zeros_like(b), q, kv), naive_mask(doc_ids))
    # Uncompiled, FlexAttention computes every score: enough to see that it attends alike.
    query, key, value = torch.randn(3, 3, 2, 40, 16).unbind(0)
    query, key, value = (x.contiguous() for x in (query, key, value))
    flexible = flex_attention(query, key, value, block_mask=mask)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=naive_mask(doc_ids)[:, None]
    )
    torch.testing.assert_close(flexible, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [128, 200, 640])
def test_blocks_are_those_that_torch_finds(seq):
    generator = torch.Generator().manual_seed(seq)
    ids = (torch.rand(4, seq, generator=generator) < 0.01).cumsum(1)
    ids[0] = 0  # one document
    ids[1] = torch.arange(seq) // 128  # documents of a block
    ids[2, -30:] = -1  # padding
    found = block_mask(ids)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (ids[b, q] == ids[b, kv])

    torchs = create_block_mask(visible, 4, None, seq, seq, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, theirs = (getattr(mask, f"{name}_num_blocks") for mask in (found, torchs))
        assert torch.equal(counts, theirs), name
        listed = torch.arange(-(-seq // 128)) < counts[..., None]
        blocks, theirs = (getattr(mask, f"{name}_indices") for mask in (found, torchs))
        assert torch.equal(blocks[listed], theirs[listed]), name
    assert found.BLOCK_SIZE == torchs.BLOCK_SIZE and found.seq_lengths == torchs.seq_lengths


def test_a_mask_needs_no_value_on_the_host():
    """Fake tensors have none: whatever reads one, and on a GPU would wait for it, fails."""
    with FakeTensorMode():
        ids = torch.zeros(2, 256, dtype=torch.int64)
        assert block_mask(ids).kv_indices.shape == (2, 1, 2, 2)
        with pytest.raises(DynamicOutputShapeException):
            list_documents(ids)


def test_which_form_a_gpu_gets():
    doc_ids = small_window(3, 20).doc_ids

    def form(widths, dtype=torch.bfloat16, attn_type="varlen"):
        return type(packed_mask(on_cuda(doc_ids), widths, dtype, attn_type)).__name__

    assert form((192, 128)) == "Documents"
    assert form((192, 128), attn_type="flex") == "BlockMask"
    assert form((192, 128), torch.float32) == "BlockMask"  # "only support fp16 and bf16"
    assert form((320, 320)) == form((20, 20)) == "BlockMask"  # "at most 256", "a multiple of 8"
    assert form((192, 15), attn_type="flex") == "OnCuda"  # flex: "must be at least 16"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Dynamo's counters, of compilations that stop at its graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    packed._compiled_flex_attention.cache_clear()
    yield torch._dynamo.utils.counters["stats"]
    packed._compiled_flex_attention.cache_clear()
    torch._dynamo.reset()


@torch.no_grad()
def test_evaluating_documents_of_many_lengths_compiles_thrice(counted):
    """Ten lengths; a graph of each would be two more than torch.compile allows."""
    for seq in range(130, 330, 20):
        ids = (torch.arange(seq) // 19).expand(2, seq)
        query, key, value = torch.randn(3, 2, 3, seq, 16).unbind(0)
        expected = attend(query, key, value, packed_mask(batch_of(ids), WIDTHS, torch.float32))
        found = attend(query, key, value, block_mask(ids))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The first length, others in as many blocks, all others.
    assert counted["unique_graphs"] == 3


# ---------------------------------------------------------------- varlen


def documents_of(starts: Tensor, longest: int) -> list[slice]:
    bounds = starts.tolist()
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    assert max(piece.stop - piece.start for piece in pieces) == longest
    return pieces


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal, of one document's q and k [S, H, d]: [H, S, S]."""
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def forward_one_by_one(q, k, v, starts, _, longest, __, is_causal, scale, window, *rest):
    """torch_attn::_varlen_attn, every document alone."""
    assert is_causal and window == [-1, 0] and starts.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out, scale = torch.empty_like(q), scale or q.shape[-1] ** -0.5
    for at in documents_of(starts, longest):
        out[at] = torch.einsum("hqk,khd->qhd", probabilities(q[at], k[at], scale), v[at])
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def backward_one_by_one(dout, q, k, v, out, lse, starts, _, longest, *rest):
    """torch_attn::_varlen_attn_backward, by the formulas of the softmax."""
    groups, scale = q.shape[1] // k.shape[1], rest[3] or q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for at in documents_of(starts, longest):
        p = probabilities(q[at], k[at], scale)
        dv[at] = torch.einsum("hqk,qhd->khd", p, dout[at])
        dp = torch.einsum("qhd,khd->hqk", dout[at], v[at])
        ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
        dq[at] = torch.einsum("hqk,khd->qhd", ds, k[at])
        dk[at] = torch.einsum("hqk,qhd->khd", ds, q[at])
    return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


@pytest.fixture
def on_cpu() -> Iterator[list[str]]:
    """torch's varlen operator on CPUs; what was called of it."""
    calls = []

    def forward(*args):
        calls.append("forward")
        return forward_one_by_one(*args)

    def backward(*args):
        calls.append("backward")
        return backward_one_by_one(*args)

    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield calls


LATENT = replace(DEEPSEEK, latent=LatentArgs(0, 16, 16, 8, 8))
SHAPES = {"grouped": ARGS, "latent": LATENT}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("selective", [False, True])
def test_varlen_attention_is_the_masked_one(name, selective, on_cpu, monkeypatch):
    model = small_model(shape=SHAPES[name], attn_mask_type="block_causal", max_seq_len=64)
    if selective:
        config = ActivationCheckpoint(mode="selective", selective_ac_option="op")
        apply_activation_checkpointing(model, config)
    batch = make_batch(small_window(3, 41), 1)

    def run():
        model.zero_grad()
        hidden = model(batch)[0]
        hidden.square().mean().backward()
        return [hidden, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    assert not on_cpu
    monkeypatch.setattr(transformer, "packed_mask", lambda b, *_: list_documents(b.doc_ids))
    for found, right in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    # Selective checkpointing keeps attention: it does not run once more.
    assert on_cpu == ["forward"] * len(model.layers) + ["backward"] * len(model.layers)


def test_any_documents_are_two_graphs_of_varlen_attention(on_cpu):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed, share in enumerate((0.0, 0.1, 0.3, 0.5, 1.0)):
        torch.manual_seed(seed)
        ids = (torch.rand(2, 24) < share).cumsum(1)
        query, key, value = torch.randn(3, 2, 2, 24, 16).requires_grad_().unbind(0)
        packed_on_gpu = packed_mask(on_cuda(ids), WIDTHS, torch.bfloat16, "varlen")
        found = compiled(query, key, value, packed_on_gpu)
        expected = attend(query, key, value, packed_mask(batch_of(ids), WIDTHS, torch.float32))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.sum().backward()
    # The longest document is a number, which torch.compile makes a symbol once it changes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_flash_attention_that_is_not_installed_is_named():
    activate_flash_attention("FA2")
    with pytest.raises(UserError, match=r'model.flash_attn_impl = "FA3": .*flash_attn_interface'):
        activate_flash_attention("FA3")
