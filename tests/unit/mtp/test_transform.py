"""The transform alone, on the meta device and on small models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.small import ARGS, DEEPSEEK, small_model
from torchtitan_mtp.config import MTP
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads, copy_last_layer

DEEP = replace(ARGS, n_layers=5)


def names(model):
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
@pytest.mark.parametrize("n", [2, 4])
def test_heads_add_names_and_change_none(heads, n):
    plain = names(build_model(ARGS))
    model = add_heads(build_model(ARGS), MTP(heads=heads, num_future_tokens=n))
    found = names(model)
    assert [name for name in found if not name.startswith("mtp.")] == plain
    block = [name.removeprefix("layers.0.") for name in plain if name.startswith("layers.0.")]
    if heads == "sequential":
        own = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "norm.weight"]
        block = [f"block.{name}" for name in block] + own
    expected = {f"mtp.heads.{i}.{name}" for i in range(n - 1) for name in block}
    assert {name for name in found if name.startswith("mtp.")} == expected
    assert all(p.is_meta for p in model.parameters())
    assert [name for name, _ in model.named_blocks()] == [
        *(f"layers.{i}" for i in range(3)),
        *(f"mtp.heads.{i}" for i in range(n - 1)),
    ]


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_one_future_token_adds_nothing(heads):
    model = add_heads(build_model(ARGS), MTP(heads=heads, num_future_tokens=1))
    assert model.mtp is None and names(model) == names(build_model(ARGS))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_matched_parameters_take_layers_for_heads(n):
    plain = build_model(DEEP)
    model = add_heads(build_model(DEEP), MTP(num_future_tokens=n, match_parameters=True))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert list(model.layers) == [str(i) for i in range(5 - (n - 1))]
    assert len(model.mtp.heads) == n - 1


def test_a_trunk_that_is_too_short_to_give_layers():
    with pytest.raises(UserError, match=r"mtp.match_parameters: a model of 3 layers.*lower"):
        add_heads(build_model(ARGS), MTP(num_future_tokens=4, match_parameters=True))


@pytest.mark.parametrize("train", ["heads", "trunk"])
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_only_heads_or_the_trunk_train_when_asked(heads, train):
    model = add_heads(build_model(ARGS), MTP(heads=heads, train=train, num_future_tokens=3))
    for name, param in model.named_parameters():
        assert param.requires_grad == (name.startswith("mtp.") == (train == "heads")), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_heads_have_the_models_dtype(heads, dtype):
    model = add_heads(build_model(ARGS, dtype), MTP(heads=heads))
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_heads_do_not_share_storage_with_the_trunk_or_each_other(heads):
    model = small_model(MTP(heads=heads, num_future_tokens=3))
    places = [p.data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("share", [False, True])
def test_number_of_modules_of_a_chain(share):
    mtp = MTP(heads="sequential", num_future_tokens=4, share_weights=share)
    model = small_model(mtp)
    assert len(model.mtp.heads) == (1 if share else 3)
    modules = [model.mtp.module(k) for k in (2, 3, 4)]
    assert len(set(map(id, modules))) == (1 if share else 3)


@pytest.mark.parametrize("shape", [ARGS, DEEPSEEK], ids=["dense", "experts"])
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_copying_sets_the_named_parameters_only(heads, shape):
    model = small_model(MTP(heads=heads, num_future_tokens=3), shape=shape)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    copy_last_layer(model, [name for name in before if name.startswith("mtp.heads.1.")])
    last = {n.removeprefix("layers.2."): w for n, w in before.items() if n.startswith("layers.2.")}
    copied = 0
    for name, param in model.state_dict().items():
        inner = name.removeprefix("mtp.heads.1.").removeprefix("block.")
        if not name.startswith("mtp.heads.1.") or inner in ("enorm.weight", "hnorm.weight"):
            assert torch.equal(param, before[name]), name
        elif inner in last:
            assert torch.equal(param, last[inner]), name
            copied += 1
    assert copied == len(last)


def test_copied_parallel_heads_compute_what_head_1_does():
    from tests.small import small_window
    from torchtitan_mtp.data.targets import make_batch

    model = small_model(MTP(num_future_tokens=3))
    copy_last_layer(model)
    first, *others = model(make_batch(small_window(2, 11), 3))
    for other in others:
        assert torch.equal(other, first)
