"""The plain decoder against the naive one; its initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.naive import head_logits
from tests.small import ARGS, small_model, small_window
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads


@pytest.mark.parametrize("kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("mask", ["causal", "block_causal"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_naive_ones(kv_heads, mask, tied):
    model = small_model(
        None, torch.float64, n_kv_heads=kv_heads, attn_mask_type=mask, tied_embeddings=tied
    )
    window = small_window(2, 12)
    with torch.no_grad():
        found = model.output(model(make_batch(window, 1))[0])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    one = MTP(num_future_tokens=1)
    for row in range(2):
        tokens, documents = window.tokens[row], window.doc_ids[row]
        (expected,) = head_logits(parameters, tokens, documents, model.args, one)
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)


def initial(mtp=None, seed=0, dtype=torch.float32, **args):
    model = build_model(replace(ARGS, **args), dtype)
    if mtp is not None:
        add_heads(model, mtp)
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_weights_depend_on_seed_and_name_only():
    first = initial()
    torch.manual_seed(99)
    torch.rand(7)
    again = initial()
    other = initial(seed=1)
    deeper = initial(n_layers=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, weight in first.items():
        assert torch.equal(weight, other[name]) == (weight.ndim == 1), name
        assert torch.equal(weight, deeper[name]), name
    wq = [first[f"layers.{i}.attention.wq.weight"] for i in range(3)]
    assert not torch.equal(wq[0], wq[1]) and not torch.equal(wq[1], wq[2])


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_heads_leave_the_trunks_weights_as_they_are(heads):
    plain = initial()
    for n in (2, 4):
        model = initial(MTP(heads=heads, num_future_tokens=n))
        assert all(torch.equal(weight, model[name]) for name, weight in plain.items())
    two, four = (initial(MTP(heads=heads, num_future_tokens=n)) for n in (2, 4))
    assert all(torch.equal(weight, four[name]) for name, weight in two.items())


def test_standard_deviations():
    """TorchTitan's scheme for its Llama: 0.02, output projections by depth, `output` by width."""
    weights = initial(
        MTP(heads="sequential", num_future_tokens=2), dim=256, multiple_of=256, vocab_size=2048
    )
    by_depth = ("attention.wo", "feed_forward.w2", "feed_forward.w3")
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        std, cut = 0.02, 3.0
        if name == "tok_embeddings.weight":
            std, cut = 1.0, torch.inf
        elif name == "output.weight":
            std = 256**-0.5
        elif any(part in name for part in by_depth):
            depth = int(name.split(".")[1]) if name.startswith("layers.") else 2
            std = 0.02 / (2 * (depth + 1)) ** 0.5
        # A normal cut at three deviations has 0.9866 of its deviation.
        expected = std * (0.9866 if cut == 3.0 else 1.0)
        assert weight.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(weight.mean().item()) < 0.05 * std, name
        assert weight.abs().max() <= 3.0001 * std or cut > 3, name


def test_a_lower_precision_rounds_the_same_weights():
    full, half = initial(), initial(dtype=torch.bfloat16)
    assert all(torch.equal(weight.bfloat16(), half[name]) for name, weight in full.items())


def test_tied_embeddings_are_one_parameter():
    weights = initial(tied_embeddings=True)
    assert "output.weight" not in weights
    std = weights["tok_embeddings.weight"].std().item()
    assert std == pytest.approx(16**-0.5, rel=0.2)  # as `output`, or logits would be too large
