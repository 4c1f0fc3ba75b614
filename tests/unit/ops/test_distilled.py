"""Heads that learn the distribution of a teacher's row, against a loop over rows in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import IGNORE, OPTIONS, gradients, loss_and_backward, make_inputs

from tests.allocations import most_alive
from tests.naive import distance
from tests.naive_loss import naive_loss
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops import chunked, linear_cross_entropy, token_losses
from torchtitan_mtp.ops.chunked import matmul_dtype
from torchtitan_mtp.ops.soft_targets import TARGET_LOSSES
from torchtitan_mtp.ops.token_losses import traceable_token_losses

SCALES = torch.tensor([1.0, 0.3, 0.7])


def problem(n=3, dtype=torch.float64, **sizes):
    """Head k has no label in the last k rows, where the teacher ends."""
    hiddens, weight, labels = make_inputs(n=n, dtype=dtype, **sizes)
    for k in range(n):
        labels[len(labels) - k :, k] = IGNORE
    return hiddens, weight, labels


def definition(hiddens, weight, labels, kind, share, z_loss, softcap, label_smoothing):
    """Loss sums of the heads, row by row."""
    sums = []
    for k, hidden in enumerate(hiddens):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(labels)):
            if labels[i, k] == IGNORE:
                continue
            x, teacher = weight @ hidden[i], (weight @ hiddens[0][(i + k) % len(labels)]).detach()
            if softcap is not None:
                x, teacher = (softcap * torch.tanh(u / softcap) for u in (x, teacher))
            loss = F.cross_entropy(x, labels[i, k], label_smoothing=label_smoothing)
            if k > 0:
                loss = share * distance(teacher, x, kind) + (1 - share) * loss
            total = total + loss + z_loss * torch.logsumexp(x, 0) ** 2
        sums.append(total)
    return sums


@pytest.mark.parametrize("kind", TARGET_LOSSES)
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_definition_in_float64(kind, share, options):
    hiddens, weight, labels = problem()
    sums = definition(hiddens, weight, labels, kind, share, **options)
    loss = sum(s * total for s, total in zip(SCALES.double(), sums, strict=True))
    exact = gradients(loss, hiddens, weight)
    options = options | {"target_loss": kind, "target_weight": share, "teacher": hiddens[0]}
    plain = linear_cross_entropy(hiddens, weight, labels)
    for op in (linear_cross_entropy, naive_loss):
        got = op(hiddens, weight, labels, SCALES.double(), chunk_rows=8, **options)
        torch.testing.assert_close(got.loss_sum, torch.stack(sums).detach(), rtol=1e-10, atol=0)
        assert torch.equal(got.valid, plain.valid) and torch.equal(got.correct, plain.correct)
        found = gradients(got.loss, hiddens, weight)
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TARGET_LOSSES)
def test_some_of_the_heads_in_a_call(kind):
    hiddens, weight, labels = problem()
    how = {"target_loss": kind, "teacher": hiddens[0].detach(), "chunk_rows": 8}
    whole = linear_cross_entropy(hiddens, weight, labels, SCALES, **how)
    last = linear_cross_entropy(hiddens[1:], weight, labels[:, 1:], SCALES[1:], first=1, **how)
    torch.testing.assert_close(last.loss_sum, whole.loss_sum[1:])
    exact = torch.autograd.grad(whole.loss, hiddens[1:])
    torch.testing.assert_close(torch.autograd.grad(last.loss, hiddens[1:]), exact)


@pytest.mark.parametrize("kind", TARGET_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_close_to_float64(dtype, kind):
    hiddens, weight, labels = problem(n=2, dtype=dtype, n_rows=64, vocab=5001)
    with torch.no_grad():
        weight.mul_(0.25)
    exact = [h.detach().double().requires_grad_() for h in (*hiddens, weight)]
    how = {"target_loss": kind, "target_weight": 0.8}
    scales = SCALES[:2]
    expected = naive_loss(exact[:2], exact[2], labels, scales, teacher=exact[0], **how)
    got = linear_cross_entropy(hiddens, weight, labels, scales, teacher=hiddens[0], **how)
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=1e-4, atol=0)
    found = gradients(got.loss, hiddens, weight)
    for a, b in zip(found, gradients(expected.loss, exact[:2], exact[2]), strict=True):
        # A CPU that multiplies in `dtype` rounds the logits to it as well.
        bound = 3e-3 if matmul_dtype(hiddens[0]) == torch.float32 else 6e-3
        assert a.dtype == dtype and (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("kind", TARGET_LOSSES)
def test_the_teacher_itself_has_nothing_to_learn(kind):
    hiddens, weight, labels = problem(n=2)
    same = [hiddens[0], hiddens[0].detach().roll(-1, 0).requires_grad_()]
    got = linear_cross_entropy(
        same, weight, labels, torch.tensor([0.0, 1.0]), target_loss=kind, teacher=hiddens[0]
    )
    assert abs(got.loss_sum[1]) < 1e-12
    if kind == "kl":  # the others have a kink there
        assert all(g.abs().max() < 1e-12 for g in gradients(got.loss, same, weight))


@pytest.mark.parametrize("kind", TARGET_LOSSES)
def test_a_teacher_that_is_sure_is_a_label(kind):
    """kl and lk are its cross-entropy then, tv what the label lacks of probability 1."""
    hiddens, weight, labels = problem(n=2)
    teacher, scales = hiddens[0].detach() * 1e4, torch.tensor([0.0, 1.0])
    sure = (teacher @ weight.T).argmax(1).roll(-1).masked_fill(labels[:, 1] == IGNORE, IGNORE)
    labels = torch.stack((labels[:, 0], sure), 1)
    expected = linear_cross_entropy(hiddens, weight, labels, scales)
    got = linear_cross_entropy(hiddens, weight, labels, scales, target_loss=kind, teacher=teacher)
    if kind == "tv":
        valid = sure != IGNORE
        q = (hiddens[1] @ weight.T).softmax(1)[valid].gather(1, sure[valid].unsqueeze(1))
        torch.testing.assert_close(got.loss, (1 - q).sum())
        return
    torch.testing.assert_close(got.loss, expected.loss)
    exact = gradients(expected.loss, hiddens, weight)
    torch.testing.assert_close(gradients(got.loss, hiddens, weight), exact)


@pytest.mark.parametrize("kind", TARGET_LOSSES)
def test_distributions_that_share_nothing_are_finite(kind):
    """exp underflows in all that the one has and the other lacks."""
    hiddens, weight, labels = problem(n=2, dtype=torch.float32)
    far = [hiddens[0], (hiddens[1].detach() * 1e4).requires_grad_()]
    got = linear_cross_entropy(
        far, weight, labels, target_loss=kind, teacher=hiddens[0].detach() * -1e4
    )
    assert got.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(got.loss, far, weight))


def test_rows_without_a_label_teach_and_learn_nothing():
    hiddens, weight, labels = problem(n=2)
    labels[5:9, 1] = IGNORE
    how = {"target_loss": "kl", "chunk_rows": 8}
    expected = linear_cross_entropy(hiddens, weight, labels, teacher=hiddens[0], **how)
    other = hiddens[0].detach().clone()
    other[6:10] = torch.nan  # what rows 5 to 8 would learn
    got = linear_cross_entropy(hiddens, weight, labels, teacher=other, **how)
    torch.testing.assert_close(tuple(got), tuple(expected))
    found = gradients(got.loss, hiddens, weight)
    assert found[1][5:9].count_nonzero() == 0 and found[1][-1].count_nonzero() == 0
    labels = torch.full_like(labels, IGNORE)
    nothing = linear_cross_entropy(hiddens, weight, labels, teacher=other, **how)
    assert nothing.loss == 0
    assert not any(g.any() for g in gradients(nothing.loss, hiddens, weight))


@pytest.mark.parametrize("kind", TARGET_LOSSES)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_as_on_a_gpu(monkeypatch, kind, options):
    """Chunks of all rows, masked; and the form for compilers."""
    hiddens, weight, labels = problem()
    how = options | {"target_loss": kind, "target_weight": 0.6, "teacher": hiddens[0]}
    expected = linear_cross_entropy(hiddens, weight, labels, SCALES, chunk_rows=8, **how)
    exact = gradients(expected.loss, hiddens, weight)

    def ranges(labels, ignore_index, chunk):
        yield from (slice(i, min(i + chunk, len(labels))) for i in range(0, len(labels), chunk))

    monkeypatch.setattr(chunked, "_row_chunks", ranges)
    monkeypatch.setattr(token_losses, "compiled_token_losses", lambda _: traceable_token_losses)
    for passes in ("eager", "compiled"):
        how |= {"passes": passes, "chunk_rows": 8}
        got = linear_cross_entropy(hiddens, weight, labels, SCALES, **how)
        torch.testing.assert_close(tuple(got), tuple(expected))
        torch.testing.assert_close(gradients(got.loss, hiddens, weight), exact)


def test_torch_compile_around_it():
    hiddens, weight, labels = problem(n=2)

    def loss(h0, h1, w):
        how = {"target_loss": "kl", "teacher": h0, "chunk_rows": 8}
        return linear_cross_entropy([h0, h1], w, labels, **how).loss

    expected = loss(*hiddens, weight)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*hiddens, weight)
    torch.testing.assert_close(got, expected)
    exact = gradients(expected, hiddens, weight)
    torch.testing.assert_close(gradients(got, hiddens, weight), exact)


@pytest.mark.parametrize("kind", TARGET_LOSSES)
def test_two_chunks_of_logits_whatever_n(kind):
    """Bytes alive in the op: one [V, D], two chunks, a few rows, the hiddens' own gradients."""
    rows, dim, vocab, chunk = 275, 16, 512, 128
    peaks = []
    for n in (2, 4):
        hiddens, weight, labels = problem(n, torch.float32, n_rows=rows, dim=dim, vocab=vocab)
        options = {"chunk_rows": chunk, "target_loss": kind, "teacher": hiddens[0]}
        peak = most_alive(partial(loss_and_backward, hiddens, weight, labels, **options))
        peaks.append(peak - 4 * n * rows * dim)
    logits = 4 * chunk * vocab
    assert peaks[0] >= 2 * logits
    assert peaks[1] - peaks[0] <= 2048  # labels' indices, a few scalars a head
    assert peaks[1] <= 2.3 * logits + 4 * vocab * dim + 4 * rows * dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_loss": None}, "there is a teacher and no target_loss; expected kl or lk or tv"),
        ({"target_loss": "mse"}, "target_loss is 'mse'; expected one of None, kl, lk, tv"),
        ({"target_weight": 1.5}, "target_weight is 1.5; expected 0 to 1"),
        ({"teacher": torch.zeros(36, 16)}, r"teacher is \[36, 16\]; expected \[N, D\] = \[37, 16"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    hiddens, weight, labels = problem(n=2, dtype=torch.float32)
    how = {"target_loss": "kl", "teacher": hiddens[0].detach()} | change
    with pytest.raises(UserError, match=message):
        linear_cross_entropy(hiddens, weight, labels, **how)
