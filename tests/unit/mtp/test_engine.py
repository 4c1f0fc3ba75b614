"""Both engines, both families: loss and every gradient against the naive computation."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.naive import total_loss
from tests.small import (
    DEEPSEEK,
    naive_parameters,
    named_gradients,
    relative_error,
    small_model,
    small_window,
)
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import IGNORE, Batch, make_batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.mtp import ENGINES, head_scales, head_weights
from torchtitan_mtp.mtp.transform import FAMILIES
from torchtitan_mtp.ops import LossOptions, LossOutput, linear_cross_entropy

MIXED = {"target_loss": "tv", "target_weight": 0.7}
CASES = [
    MTP(num_future_tokens=1),
    MTP(num_future_tokens=2, loss_scale=0.5),
    MTP(num_future_tokens=4, loss_weights=[0.5, 2.0, 1.0]),
    MTP(num_future_tokens=4, detach_trunk=True),
    MTP(num_future_tokens=3, match_parameters=True),
    MTP(heads="sequential", num_future_tokens=2, loss_scale=0.3, loss_reduction="mean"),
    MTP(heads="sequential", num_future_tokens=4, loss_reduction="mean", loss_scale=0.3),
    MTP(heads="sequential", num_future_tokens=4, share_weights=True),
    MTP(heads="sequential", num_future_tokens=3, detach_trunk=True),
    MTP(heads="sequential", num_future_tokens=3, trunk_state="raw"),
    MTP(heads="sequential", num_future_tokens=3, trunk_state="raw", detach_trunk=True),
    MTP(heads="medusa", num_future_tokens=4, loss_weights=[0.5, 2.0, 1.0]),
    MTP(heads="medusa", num_future_tokens=3, detach_trunk=True),
    MTP(num_future_tokens=3, train="trunk"),
    MTP(heads="sequential", num_future_tokens=3, train="trunk"),
    MTP(num_future_tokens=4, loss_weights=[0.5, 2.0, 1.0], target="trunk"),
    MTP(num_future_tokens=3, detach_trunk=True, target="trunk", target_loss="tv"),
    MTP(num_future_tokens=3, train="heads", target="trunk", target_loss="lk"),
    MTP(heads="sequential", num_future_tokens=3, target="trunk", target_loss="lk"),
    MTP(heads="sequential", num_future_tokens=3, target="trunk", share_weights=True, **MIXED),
    MTP(heads="sequential", num_future_tokens=3, detach_trunk=True, target="trunk", **MIXED),
    MTP(heads="medusa", num_future_tokens=4, target="trunk", **MIXED),
    MTP(heads="medusa", num_future_tokens=3, detach_trunk=True, target="trunk"),
]


def scales_of(mtp: MTP, batch: Batch) -> torch.Tensor:
    valid = (batch.labels != IGNORE).sum((0, 1))
    return head_scales(head_weights(mtp, 1, 10), valid)


def naive_gradients(model, window, mtp):
    parameters = naive_parameters(model)
    loss, losses = total_loss(parameters, window.tokens, window.doc_ids, model.args, mtp)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in parameters.items()
        if p.requires_grad
    }
    return loss.detach(), losses, gradients


SHAPES = {
    "plain": {},
    "tied": {"tied_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "deepseek": {"shape": DEEPSEEK},
}


def one_graph(model, batch, scales, options, _):
    """Plain autograd, all states kept: of every family."""
    hiddens, weight = [h.flatten(0, 1) for h in model(batch)], model.output.weight
    labels, how = batch.labels.flatten(0, 1), {"options": options}
    if options.target_loss is not None:
        how["teacher"] = hiddens[0].detach()
    outputs = [
        linear_cross_entropy([h], w, labels[:, k : k + 1], scales[k : k + 1], first=k, **how)
        for k, h in enumerate(hiddens)
        for w in [weight.detach() if k and model.mtp.detach_trunk else weight]
    ]
    loss = torch.stack([out.loss for out in outputs]).sum()
    loss.backward()
    sums = [torch.cat(parts) for parts in list(zip(*outputs, strict=True))[1:]]
    return LossOutput(loss.detach(), *sums)


RUNS = ENGINES | {"one graph": one_graph}
WAYS = [(h, e) for h in FAMILIES for e in ENGINES if (h, e) != ("sequential", "joint")]
ways = pytest.mark.parametrize(("heads", "engine"), WAYS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mtp", CASES, ids=lambda mtp: mtp.heads)
def test_loss_and_gradients_are_the_naive_ones(mtp, shape):
    check_against_naive(mtp, shape, torch.device("cpu"))


def check_against_naive(mtp: MTP, shape: str, device: torch.device) -> None:
    """All runs on `device`, for what is naive takes long."""
    window = small_window(2, 9 + mtp.num_future_tokens)
    batch, options = make_batch(window, mtp.num_future_tokens, mtp.target == "trunk"), {}
    if mtp.target == "trunk":
        options = {"target_loss": mtp.target_loss, "target_weight": mtp.target_weight}
    model = small_model(mtp, torch.float64, **SHAPES[shape])
    loss, losses, expected = naive_gradients(model, window, mtp)
    model, batch, scales = model.to(device), batch.to(device), scales_of(mtp, batch).to(device)
    for run, train in RUNS.items():
        if run == "joint" and mtp.heads == "sequential":
            continue
        model.zero_grad()
        how = LossOptions(chunk_rows=5, **options)
        out = train(model, batch, scales, how, True)
        # head_scales are float32 whatever the model is.
        torch.testing.assert_close(out.loss.cpu(), loss, rtol=1e-6, atol=0)
        valid = out.valid.clamp(min=1)
        torch.testing.assert_close((out.loss_sum / valid).tolist(), losses, rtol=1e-9, atol=1e-12)
        found = named_gradients(model)
        assert found.keys() >= expected.keys()
        for name, parameter in model.named_parameters():
            if name not in expected:
                assert parameter.grad is None, (run, name)
                continue
            assert relative_error(found[name].cpu(), expected[name]) < 1e-6, (run, name)


def test_a_chain_is_not_joint():
    mtp = MTP(heads="sequential", num_future_tokens=3)
    model, batch = small_model(mtp), make_batch(small_window(2, 12), 3)
    with pytest.raises(UserError, match=r"^joint: the heads are a chain; .* use head_by_head$"):
        ENGINES["joint"](model, batch, scales_of(mtp, batch), LossOptions(), True)
    assert all(p.grad is None for p in model.parameters())


@ways
def test_scale_zero_and_n_1_give_the_plain_models_trunk_gradients_to_the_bit(heads, engine):
    n = 3
    window = small_window(2, 12 + n)
    plain = small_model(None)
    one = MTP(num_future_tokens=1)
    batch = make_batch(window._replace(tokens=window.tokens, doc_ids=window.doc_ids), n)
    first = batch._replace(labels=batch.labels[..., :1], future_tokens=batch.future_tokens[..., :0])
    ENGINES[engine](plain, first, scales_of(one, first), LossOptions(), True)
    expected = named_gradients(plain)
    for mtp, data in [
        (one, first),
        (MTP(heads=heads, num_future_tokens=n, loss_scale=0.0), batch),
    ]:
        model = small_model(mtp)
        ENGINES[engine](model, data, scales_of(mtp, data), LossOptions(), True)
        found = named_gradients(model)
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name


@ways
def test_a_batch_without_targets_gives_zero_gradients_and_a_finite_loss(heads, engine):
    mtp = MTP(heads=heads, num_future_tokens=3)
    model = small_model(mtp)
    batch = make_batch(small_window(2, 11), 3)
    batch = batch._replace(labels=torch.full_like(batch.labels, IGNORE))
    out = ENGINES[engine](model, batch, scales_of(mtp, batch), LossOptions(), True)
    assert out.loss.item() == 0 and out.valid.tolist() == [0, 0, 0]
    assert all(g.count_nonzero() == 0 for g in named_gradients(model).values())


@ways
def test_detached_heads_leave_the_trunk_to_head_1(heads, engine):
    """With head 1's loss out of the total, nothing outside mtp.* gets a gradient."""
    mtp = MTP(heads=heads, num_future_tokens=3, detach_trunk=True)
    model = small_model(mtp)
    batch = make_batch(small_window(2, 14), 3)
    scales = scales_of(mtp, batch)
    scales[0] = 0
    ENGINES[engine](model, batch, scales, LossOptions(), True)
    for name, gradient in named_gradients(model).items():
        assert bool(gradient.count_nonzero()) == name.startswith("mtp."), name


@ways
def test_a_frozen_trunk_has_no_gradients_at_all(heads, engine):
    mtp = MTP(heads=heads, num_future_tokens=3, train="heads")
    model = small_model(mtp)
    batch = make_batch(small_window(2, 14), 3)
    out = ENGINES[engine](model, batch, scales_of(mtp, batch), LossOptions(), True)
    for name, param in model.named_parameters():
        assert (param.grad is None) == (not name.startswith("mtp.")), name
    free = small_model(MTP(heads=heads, num_future_tokens=3, detach_trunk=True))
    ENGINES[engine](free, batch, scales_of(mtp, batch), LossOptions(), True)
    with torch.no_grad():
        again = free.output.loss(
            free(batch),
            batch.labels,
            functools.partial(linear_cross_entropy, head_scales=scales_of(mtp, batch)),
        )
    torch.testing.assert_close(again.loss, out.loss, rtol=1e-6, atol=0)
    expected = dict(free.named_parameters())
    for name, param in model.named_parameters():
        if param.grad is not None:
            assert relative_error(param.grad, expected[name].grad) < 1e-5, name


@pytest.mark.parametrize("heads", FAMILIES)
def test_no_loss_term_sees_a_token_that_it_may_not_see(heads):
    """Changing t[j] leaves head k's hidden states at i < j - k + 1 as they were: parallel heads see
    t[..i], sequential ones t[..i+k-1]; and other documents see nothing."""
    n, seq, change = 3, 12, 7
    model = small_model(MTP(heads=heads, num_future_tokens=n), torch.float64)
    tokens = torch.randint(0, 29, (1, seq + n), generator=torch.Generator().manual_seed(3))
    doc_ids = torch.zeros_like(tokens)
    doc_ids[:, change + 3 :] = 1
    before = model(make_batch(small_window(1, seq + n)._replace(tokens=tokens, doc_ids=doc_ids), n))
    other = tokens.clone()
    other[0, change] = (tokens[0, change] + 1) % 29
    window = small_window(1, seq + n)._replace(tokens=other, doc_ids=doc_ids)
    after = model(make_batch(window, n))
    for k in range(1, n + 1):
        first = change if heads != "sequential" else change - k + 1
        changed = (before[k - 1] - after[k - 1]).abs().amax(-1)[0] > 0
        expected = [first <= i < change + 3 for i in range(seq)]
        # A module at the end of document 0 embeds the next document's tokens; nobody learns there.
        assert changed.tolist() == expected, k


@pytest.mark.parametrize("heads", FAMILIES)
def test_packed_documents_are_the_same_documents_apart(heads):
    """Loss sums and gradients of two documents in one window = each in a window of its own."""
    n, lengths = 3, (8, 9)
    mtp = MTP(heads=heads, num_future_tokens=n)
    tokens = torch.randint(0, 29, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    ones = torch.ones(n)

    def gradients(windows):
        model = small_model(mtp, torch.float64)
        sums = []
        for row, docs in windows:
            pad = torch.zeros(1, n, dtype=torch.long)
            window = small_window(1, 1)._replace(
                tokens=torch.cat((row, pad), 1), doc_ids=torch.cat((docs, pad - 1), 1)
            )
            out = ENGINES["head_by_head"](model, make_batch(window, n), ones, LossOptions(), True)
            sums.append(out.loss_sum)
        return torch.stack(sums).sum(0), named_gradients(model)

    a, b = tokens[:, : lengths[0]], tokens[:, lengths[0] :]
    docs = torch.tensor([[0] * lengths[0] + [1] * lengths[1]])
    packed_loss, packed = gradients([(tokens, docs)])
    apart_loss, apart = gradients([(a, torch.zeros_like(a)), (b, torch.zeros_like(b))])
    torch.testing.assert_close(packed_loss, apart_loss, rtol=1e-10, atol=0)
    for name in packed:
        assert relative_error(packed[name], apart[name]) < 1e-6, name
