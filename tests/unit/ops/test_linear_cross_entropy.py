"""`linear_cross_entropy` against a reference written here, in float64, float32 and bfloat16."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import IGNORE, OPTIONS, gradients, loss_and_backward, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from tests.allocations import most_alive
from tests.naive_loss import naive_loss
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops import (
    LossOptions,
    LossOutput,
    head_loss_and_grad,
    linear_cross_entropy,
)
from torchtitan_mtp.ops.chunked import _CPU_CHUNK_ROWS, default_chunk_rows, matmul_dtype

both = pytest.mark.parametrize("op", [linear_cross_entropy, naive_loss])


def reference(hiddens, weight, labels, scales, z_loss=0.0, softcap=None, label_smoothing=0.0):
    """Token by token from the definition: no shared code with the op."""
    sums, valid, correct = [], [], []
    for k, hidden in enumerate(hiddens):
        rows = [i for i in range(len(labels)) if labels[i, k] != IGNORE]
        x = hidden @ weight.T
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        total = x.new_zeros(())
        for i in rows:
            lse = torch.logsumexp(x[i], 0)
            total = total + (1 - label_smoothing) * (lse - x[i, labels[i, k]])
            total = total + label_smoothing * (lse - x[i].mean()) + z_loss * lse**2
        sums.append(total)
        valid.append(len(rows))
        correct.append(sum(int(x[i].argmax() == labels[i, k]) for i in rows))
    loss = sum(s * total for s, total in zip(scales.tolist(), sums, strict=True))
    return loss, torch.stack(sums), valid, correct


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@both
def test_equals_definition_in_float64(op, options):
    hiddens, weight, labels = make_inputs()
    labels[:3, 0] = (hiddens[0][:3] @ weight.T).argmax(1)  # some correct ones
    scales = torch.tensor([1.0, 0.3, 0.0])
    expected = reference(hiddens, weight, labels, scales, **options)
    got = op(hiddens, weight, labels, scales, chunk_rows=8, **options)
    assert isinstance(got, LossOutput)
    assert got.loss.dtype == got.loss_sum.dtype == torch.float64
    assert got.valid.dtype == got.correct.dtype == torch.int64
    torch.testing.assert_close(got.loss, expected[0], rtol=1e-7, atol=0)  # scales are float32
    torch.testing.assert_close(got.loss_sum, expected[1], rtol=1e-12, atol=0)
    assert got.valid.tolist() == expected[2]
    assert got.correct.tolist() == expected[3] and got.correct[0] >= 3
    assert not got.loss_sum.requires_grad
    for a, b in zip(
        gradients(got.loss, hiddens, weight, -2.5),
        gradients(expected[0], hiddens, weight, -2.5),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("a_head", [False, True])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
@both
def test_row_weights_in_float64(op, options, a_head):
    """Token by token: weights of either sign, a zero among them; [N] counts for every head."""
    hiddens, weight, labels = make_inputs()
    scales = torch.tensor([1.0, 0.3, 2.0])
    weights = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64).view(labels.shape)
    weights[5] = 0
    weights = weights if a_head else weights[:, 0]
    how = options | {"row_weights": weights, "chunk_rows": 8}
    got = op(hiddens, weight, labels, scales, **how)
    sums = []
    for k in range(3):
        rows = [  # one row at a time, so that only the weights are new
            reference([hiddens[k][[i]]], weight, labels[[i], k : k + 1], scales[:1], **options)
            for i in range(len(labels))
        ]
        of_head = weights[:, k] if a_head else weights
        sums.append(sum(w * row[1][0] for w, row in zip(of_head, rows, strict=True)))
    expected = sum(s * total for s, total in zip(scales.double(), sums, strict=True))
    torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.loss_sum, torch.stack(sums).detach(), rtol=1e-10, atol=0)
    plain = op(hiddens, weight, labels, scales, **options)
    assert torch.equal(got.valid, plain.valid) and torch.equal(got.correct, plain.correct)
    for a, b in zip(
        gradients(got.loss, hiddens, weight, 1.5),
        gradients(expected, hiddens, weight, 1.5),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_row_weights_compile_and_are_constants():
    hiddens, weight, labels = make_inputs(n=2)
    weights = torch.rand(len(labels), dtype=torch.float64, requires_grad=True)

    def loss(hiddens, weight):
        return linear_cross_entropy(hiddens, weight, labels, row_weights=weights).loss

    expected = gradients(loss(hiddens, weight), hiddens, weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = compiled(hiddens, weight)
    torch.testing.assert_close(gradients(found, hiddens, weight), expected)
    assert torch.autograd.grad(loss(hiddens, weight), weights, allow_unused=True) == (None,)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_float32_close_to_float64(options):
    hiddens, weight, labels = make_inputs(n=2, n_rows=130, dim=32, vocab=517)
    scales = torch.tensor([1.0, 0.3])
    expected = naive_loss(hiddens, weight, labels, scales, **options)
    exact = gradients(expected.loss, hiddens, weight)
    low = [h.detach().float().requires_grad_() for h in hiddens]
    low_weight = weight.detach().float().requires_grad_()
    got = linear_cross_entropy(low, low_weight, labels, scales, chunk_rows=48, **options)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients(got.loss, low, low_weight), exact, strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("vocab", [5001, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_close_to_float64(dtype, vocab):
    hiddens, weight, labels = make_inputs(n=2, n_rows=64, dim=16, vocab=vocab, dtype=dtype)
    with torch.no_grad():
        weight.mul_(0.25)
    scales = torch.tensor([1.0, 0.3])
    exact = [h.detach().double().requires_grad_() for h in hiddens]
    exact_weight = weight.detach().double().requires_grad_()
    expected = naive_loss(exact, exact_weight, labels, scales)
    got = linear_cross_entropy(hiddens, weight, labels, scales)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=1e-4, atol=0)
    for a, b in zip(
        gradients(got.loss, hiddens, weight),
        gradients(expected.loss, exact, exact_weight),
        strict=True,
    ):
        assert a.dtype == dtype
        # A CPU that multiplies in `dtype` rounds the logits to it as well.
        bound = 3e-3 if matmul_dtype(hiddens[0]) == torch.float32 else 6e-3
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("chunk_rows", [1, 7, 37, 1000, None])
def test_any_number_of_heads_and_chunk_rows(n, chunk_rows):
    hiddens, weight, labels = make_inputs(n=n)
    expected = naive_loss(hiddens, weight, labels)
    got = linear_cross_entropy(hiddens, weight, labels, chunk_rows=chunk_rows)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        gradients(got.loss, hiddens, weight), gradients(expected.loss, hiddens, weight)
    )


def test_stacked_hiddens_and_non_contiguous_inputs():
    hiddens, weight, labels = make_inputs(n=2)
    expected = linear_cross_entropy(hiddens, weight, labels)
    exact = gradients(expected.loss, hiddens, weight)
    stacked = torch.stack(list(hiddens)).detach()  # [n, N, D]
    stacked = stacked.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    weight_t = weight.detach().t().contiguous().t().requires_grad_()  # [V, D], column-major
    labels_t = labels.t().contiguous().t()
    got = linear_cross_entropy(stacked, weight_t, labels_t, chunk_rows=5)
    torch.testing.assert_close(got, expected)
    d_stacked, d_weight = torch.autograd.grad(got.loss, [stacked, weight_t])
    torch.testing.assert_close(d_stacked, torch.stack(exact[:2]))
    torch.testing.assert_close(d_weight, exact[2])


@both
def test_all_ignored_is_zero_with_zero_gradients(op):
    hiddens, weight, labels = make_inputs()
    labels.fill_(IGNORE)
    got = op(hiddens, weight, labels, z_loss=1e-2)
    assert got.loss == 0 and got.valid.tolist() == [0, 0, 0] and got.correct.tolist() == [0, 0, 0]
    for gradient in gradients(got.loss, hiddens, weight):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_head_without_valid_labels_and_other_ignore_index():
    hiddens, weight, labels = make_inputs()
    labels[:, 1] = IGNORE
    expected = linear_cross_entropy(hiddens, weight, labels)
    assert expected.valid[1] == 0 and expected.loss_sum[1] == 0
    moved = torch.where(labels == IGNORE, 7, torch.where(labels == 7, 8, labels))
    labels = torch.where(moved == 7, IGNORE, moved)
    a = linear_cross_entropy(hiddens, weight, moved, ignore_index=7)
    b = linear_cross_entropy(hiddens, weight, labels)
    torch.testing.assert_close(a, b)
    assert gradients(a.loss, hiddens, weight)[1].abs().max() == 0


def test_no_rows():
    hiddens, weight, labels = make_inputs(n_rows=0)
    got = linear_cross_entropy(hiddens, weight, labels)
    d_hidden, *_, d_weight = gradients(got.loss, hiddens, weight)
    assert got.loss == 0 and d_hidden.shape == (0, 16) and d_weight.abs().max() == 0


def test_extreme_logits_stay_finite():
    hiddens, weight, labels = make_inputs(dtype=torch.float32)
    large = [(h.detach() * 1e4).requires_grad_() for h in hiddens]
    expected = naive_loss(large, weight, labels)
    got = linear_cross_entropy(large, weight, labels)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(
        gradients(got.loss, large, weight), gradients(expected.loss, large, weight)
    )


@both
def test_ties_are_not_correct(op):
    hiddens, _, labels = make_inputs(n=1, ignored=0)
    labels[0] = 0  # what argmax would say
    zeros = torch.zeros(101, 16, dtype=torch.float64)
    got = op(hiddens, zeros, labels)
    assert got.correct.item() == 0  # an untrained, zero unembedding has no right answers


def test_gradcheck():
    hiddens, weight, labels = make_inputs(n=2, n_rows=5, dim=3, vocab=7)
    scales = torch.tensor([0.5, 2.0])

    def loss(h0, h1, w):
        out = linear_cross_entropy(
            [h0, h1], w, labels, scales, z_loss=0.1, softcap=3.0, label_smoothing=0.1, chunk_rows=2
        )
        return out.loss

    assert torch.autograd.gradcheck(loss, (*hiddens, weight))


def test_tied_weight_and_two_uses_accumulate():
    _, weight, labels = make_inputs(n=1)
    tokens = torch.arange(37) % 101

    def total(op):
        hidden = F.embedding(tokens, weight)
        first = op([hidden], weight, labels)
        second = op([hidden.tanh()], weight, labels, z_loss=0.1)
        return first.loss + 0.5 * second.loss

    expected = torch.autograd.grad(total(naive_loss), weight)
    weight.grad = torch.ones_like(weight)  # as accumulation over micro-batches finds it
    total(linear_cross_entropy).backward()
    torch.testing.assert_close(weight.grad, expected[0] + 1)


def test_frozen_weight_or_hidden_costs_no_gradient():
    hiddens, weight, labels = make_inputs(n=2)
    exact = gradients(linear_cross_entropy(hiddens, weight, labels).loss, hiddens, weight)
    frozen = [hiddens[0], hiddens[1].detach()]
    loss = linear_cross_entropy(frozen, weight.detach(), labels).loss
    torch.testing.assert_close(torch.autograd.grad(loss, hiddens[0])[0], exact[0])
    loss = linear_cross_entropy([h.detach() for h in hiddens], weight, labels).loss
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], exact[2])


def test_no_grad_computes_loss_only():
    hiddens, weight, labels = make_inputs(n=2)
    expected = linear_cross_entropy(hiddens, weight, labels)
    with torch.no_grad(), LargestTensor() as largest:
        got = linear_cross_entropy(hiddens, weight, labels, chunk_rows=8)
    assert not got.loss.requires_grad
    chunks = sum(-(-valid // 8) for valid in expected.valid.tolist())
    assert largest.matmuls == chunks  # the projection, nothing else
    torch.testing.assert_close(tuple(got), tuple(x.detach() for x in expected))


def test_second_backward_needs_retain_graph():
    hiddens, weight, labels = make_inputs()
    loss = linear_cross_entropy(hiddens, weight, labels).loss
    first = torch.autograd.grad(loss, weight, retain_graph=True)
    second = torch.autograd.grad(loss * 2, weight)
    torch.testing.assert_close(second[0], 2 * first[0])
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Records the largest new tensor, and counts matrix products."""

    def __init__(self):
        super().__init__()
        self.numel = self.matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.matmuls += name in ("mm", "addmm", "addmm_")
        seen = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in seen:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_whole_logits_or_weight_copies(dtype):
    n_rows, dim, vocab, chunk = 96, 8, 9001, 8
    hiddens, weight, labels = make_inputs(4, n_rows, dim, vocab, dtype=dtype)
    with LargestTensor() as largest:
        linear_cross_entropy(hiddens, weight, labels, chunk_rows=chunk).loss.backward()
    assert largest.numel == max(vocab * dim, chunk * vocab, n_rows * dim)


def test_one_weight_gradient_for_all_heads():
    """Bytes alive in the op: one [V, D], one chunk of logits, the hiddens' own gradients."""
    dim, vocab, chunk = 16, 4096, 8
    peaks = []
    for n in (1, 4):
        hiddens, weight, labels = make_inputs(n, 64, dim, vocab, dtype=torch.float32)
        options = {"chunk_rows": chunk}
        peak = most_alive(partial(loss_and_backward, hiddens, weight, labels, **options))
        peaks.append(peak - 4 * n * 64 * dim)
    assert peaks[0] >= 4 * vocab * (dim + chunk)
    assert peaks[1] - peaks[0] <= 4096  # a few scalars a head
    assert peaks[1] <= 1.1 * 4 * vocab * (dim + chunk)


class MatmulDtypes(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def test_autocast_keeps_weight_gradient_in_float32():
    hiddens, weight, labels = make_inputs(n=2, dtype=torch.float32)
    expected = linear_cross_entropy(hiddens, weight, labels)
    exact = gradients(expected.loss, hiddens, weight)
    mixed = [hiddens[0], hiddens[1].detach().bfloat16().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16), MatmulDtypes() as products:
        got = linear_cross_entropy(mixed, weight, labels)
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert products.dtypes == {torch.bfloat16 if bf16 else torch.float32}
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-2, atol=0)
    for a, b, x in zip(gradients(got.loss, mixed, weight), exact, [*mixed, weight], strict=True):
        assert a.dtype == x.dtype
        assert (a.float() - b).norm() <= 2e-2 * b.norm()


def test_head_by_head_with_one_buffer_equals_one_call():
    hiddens, weight, labels = make_inputs()
    scales = torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64)
    options = LossOptions(z_loss=1e-2)
    expected = linear_cross_entropy(hiddens, weight, labels, scales, z_loss=1e-2)
    exact = gradients(expected.loss, hiddens, weight)
    d_weight = torch.zeros_like(weight)
    with torch.no_grad():
        heads = [
            head_loss_and_grad(hidden, weight, labels[:, k], scales[k], options, d_weight=d_weight)
            for k, hidden in enumerate(hiddens)
        ]
    losses, d_hiddens = zip(*heads, strict=True)
    torch.testing.assert_close(torch.stack([x.loss_sum for x in losses]), expected.loss_sum)
    torch.testing.assert_close(d_hiddens, tuple(exact[:3]))
    torch.testing.assert_close(d_weight, exact[3])


def test_products_in_bfloat16_where_the_device_has_them():
    """`mm` forces what a device with bf16 units does: bf16 products, fp32 sums and softmax."""
    hiddens, weight, labels = make_inputs(n=1, n_rows=12, vocab=40, dtype=torch.bfloat16)
    scale = torch.tensor(1e-6)
    exact = [x.detach().double().requires_grad_() for x in (hiddens[0], weight)]
    expected = linear_cross_entropy([exact[0]], exact[1], labels, scale[None], z_loss=1e-2)
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    with torch.no_grad():
        losses, found = head_loss_and_grad(
            hiddens[0],
            weight,
            labels[:, 0],
            scale,
            LossOptions(z_loss=1e-2, chunk_rows=5),
            d_weight=d_weight,
            mm=torch.bfloat16,
        )
    torch.testing.assert_close(losses.loss_sum.double(), expected.loss_sum[0], rtol=5e-3, atol=0)
    d_hidden, exact_d_weight = torch.autograd.grad(expected.loss, exact)
    assert found is not None and found.dtype == torch.bfloat16
    assert (found.double() - d_hidden).norm() <= 2e-2 * d_hidden.norm()
    assert (d_weight.double() - exact_d_weight).norm() <= 2e-2 * exact_d_weight.norm()


def test_negative_label_is_an_error_not_a_class():
    hiddens, weight, labels = make_inputs(n=1)
    labels[0] = -1
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hiddens, weight, labels)


def test_default_chunk_is_large_enough_for_tests_to_split():
    hiddens, weight, labels = make_inputs(n=1, n_rows=_CPU_CHUNK_ROWS + 3, ignored=0)
    expected = naive_loss(hiddens, weight, labels)
    torch.testing.assert_close(linear_cross_entropy(hiddens, weight, labels), expected)


@pytest.mark.parametrize(
    ("n_rows", "dim", "logit_bytes", "rows"),
    [  # At most 3 D bytes of logits and gradient in a column, or 1024 rows; in equal chunks.
        (8192, 4096, 4 + 2, 2048),
        (8192, 4096, 4, 2816),  # three chunks of 2731, in tiles of 128
        (8192, 4096, 2, 4096),  # two, of at most 6144
        (5000, 4096, 4 + 2, 1792),
        (2048, 512, 4, 1024),
        (0, 512, 4, 0),
    ],
)
def test_chunks_on_a_gpu(n_rows, dim, logit_bytes, rows):
    hidden = torch.empty(n_rows, dim, device="meta")
    assert default_chunk_rows(hidden, logit_bytes) == rows


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13")
def test_equals_torchs_own():
    hiddens, weight, labels = make_inputs(dtype=torch.float32)
    for rows in (None, 8):
        got = linear_cross_entropy(hiddens, weight, labels, chunk_rows=rows)
        how = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        sums = [
            F.linear_cross_entropy(hidden, weight, y, reduction="sum", options=how)
            for hidden, y in zip(hiddens, labels.unbind(1), strict=True)
        ]
        torch.testing.assert_close(got.loss_sum, torch.stack(sums).detach())
        exact = gradients(sum(sums), hiddens, weight)
        torch.testing.assert_close(gradients(got.loss, hiddens, weight), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiddens": []}, "hiddens is empty"),
        ({"hiddens": torch.zeros(37, 16)}, r"hiddens is \[37, 16\]; expected n tensors"),
        ({"hiddens": [torch.zeros(37, 15)]}, r"hiddens\[0\] is \[37, 15\]; .* \[37, 16\]"),
        ({"hiddens": [torch.zeros(37, 16).bfloat16()]}, "bfloat16 and weight torch.float32"),
        ({"weight": torch.zeros(16)}, r"weight is \[16\]"),
        ({"labels": torch.zeros(37, dtype=torch.int64)}, r"labels is \[37\]; .* \[37, 1\]"),
        ({"labels": torch.zeros(37, 1)}, "labels is torch.float32"),
        ({"head_scales": torch.ones(2)}, r"head_scales is \[2\]; expected \[n\] = \[1\]"),
        (
            {"row_weights": torch.ones(36)},
            r"row_weights is \[36\]; expected \[N\] = \[37\] or \[N, n\] = \[37, 1\]",
        ),
        (
            {"row_weights": torch.ones(37, device="meta")},
            "row_weights is on meta and weight on cpu",
        ),
        ({"head_scales": torch.ones(1, device="meta")}, "head_scales is on meta and weight on cpu"),
        (
            {"labels": torch.zeros(37, 1, dtype=torch.int64, device="meta")},
            "labels is on meta and weight on cpu",
        ),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"passes": "fast"}, "passes is 'fast'; expected one of eager, compiled, triton"),
        ({"bf16_logits": True}, 'bf16_logits is True; expected False with passes="eager"'),
        (
            {"options": LossOptions(), "z_loss": 1e-4},
            "options and z_loss are given; expected one of them",
        ),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    hiddens, weight, labels = make_inputs(n=1, dtype=torch.float32)
    arguments = {"hiddens": hiddens, "weight": weight, "labels": labels} | change
    with pytest.raises(UserError, match=message) as error:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(error.value)
