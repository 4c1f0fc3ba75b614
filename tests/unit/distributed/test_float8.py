"""Which layers become float8, and whole runs with it, emulated on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from runs import DEEPSEEK as DEEPSEEK_RUN
from runs import HEAD_BY_HEAD, JOINT, SEQUENTIAL, config_of, interrupt_after, same, train
from tests.small import ARGS, DEEPSEEK, perturb_norms
from torchtitan_mtp.config import MTP, Float8Linear
from torchtitan_mtp.distributed.float8 import convert_to_float8, float8_scales_after_step
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads

Float8 = pytest.importorskip("torchao.float8.float8_linear").Float8Linear
FLOAT8 = {"model.converters": ["mtp", "quantize.linear.float8"], "training.steps": 4}
RECIPE = "quantize.linear.float8.recipe_name"
FAMILIES = {
    "joint": JOINT,
    "head_by_head": HEAD_BY_HEAD,
    "chain": SEQUENTIAL,
    "experts": DEEPSEEK_RUN,
}


def kinds(heads: str, **keys) -> dict[str, bool]:
    """Name of every linear layer -> whether it is float8."""
    model = add_heads(build_model(ARGS), MTP(heads=heads, num_future_tokens=3))
    convert_to_float8(model, Float8Linear(**keys))
    return {n: isinstance(m, Float8) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_every_layer_but_output_is_converted(heads, recipe):
    found = kinds(heads, recipe_name=recipe)
    # 8 wide key and value projections are not multiples of 16.
    small = {name for name in found if name.endswith(("wk", "wv"))}
    assert {name for name, converted in found.items() if not converted} == small | {"output"}
    assert any(name.startswith("mtp.heads.1.") for name in found)
    if heads == "sequential":
        assert found["mtp.heads.0.eh_proj"]


RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def relative_errors(recipe) -> dict[str, list[float]]:
    """Of a float8 layer against float64's arithmetic: of each row of the output and of the input's
    gradient, and of the weight's gradient. The last rows are so much
    larger than the others that one scale leaves nothing of them, in e4m3 and in e5m2."""
    generator = torch.Generator().manual_seed(0)
    weight, x, dy = (torch.randn(32, 32, generator=generator) for _ in range(3))
    x[-1] *= 1e6
    dy[-1] *= 1e11
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    model[0].weight.data.copy_(weight)
    convert_to_float8(model, Float8Linear(recipe_name=recipe))
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(dy)
    weight64, x64, dy64 = weight.double(), x.double(), dy.double()

    def error(found, expected):
        return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).tolist()

    return {
        "output": error(y.detach(), x64 @ weight64.T),
        "input": error(leaf.grad, dy64 @ weight64),
        "weight": error(model[0].weight.grad.flatten(), (dy64.T @ x64).flatten()),
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_scales_and_rounds(recipe):
    """e4m3 keeps 3 bits of each number, which is about 4% of a row's norm."""
    errors = relative_errors(recipe)
    small = [*errors["output"][:-1], *errors["input"][:-1]]
    assert 0.01 < errors["output"][-1] < 0.06
    if recipe == "tensorwise":
        assert min(small) > 0.9  # nothing is left
    else:
        assert min(small) > 0.01 and max(small) < 0.06
    if recipe == "rowwise_with_gw_hp":
        assert errors["weight"] < 1e-6  # in the layer's own precision
    else:
        assert errors["weight"] > 0.01


@pytest.mark.parametrize("recipe", RECIPES)
def test_rowwise_recipes_compile_with_the_rounding_of_eager_code(recipe, monkeypatch):
    """As TorchTitan has it, which saw losses become nan without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with torch._inductor.config.patch(emulate_precision_casts=False):
        convert_to_float8(build_model(ARGS), Float8Linear(recipe_name=recipe), compiled=True)
        assert torch._inductor.config.emulate_precision_casts == (recipe != "tensorwise")


def test_an_emulation_is_not_compiled():
    for float8 in (Float8Linear(), Float8Linear(emulate=True)):  # a CPU emulates in any case
        with pytest.raises(UserError, match=r"torch\.compile can't .*; set compile.enable = false"):
            convert_to_float8(build_model(ARGS), float8, compiled=True)


def test_biases_stay_as_they_are():
    args = replace(ARGS, dim=64, qkv_bias=True)
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for convert in (lambda model: None, lambda model: convert_to_float8(model, Float8Linear())):
        model = build_model(args)
        convert(model)
        model.to_empty(device="cpu")
        init_weights(model, 0)
        perturb_norms(model)
        outputs.append(model.layers["0"].attention.wq(x))
    assert isinstance(model.layers["0"].attention.wq, Float8)
    bias = model.layers["0"].attention.wq.bias
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.1)
    assert (outputs[1] - bias - outputs[0]).abs().mean() > 0.15  # without them it is another


def test_routers_and_experts_stay():
    shape = replace(DEEPSEEK, dim=32, moe=replace(DEEPSEEK.moe, num_experts=16, hidden_dim=16))
    model = add_heads(build_model(shape), MTP(heads="sequential", num_future_tokens=2))
    convert_to_float8(model, Float8Linear())
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    routers = {name for name in linear if name.endswith("moe.router.gate")}
    assert len(routers) == 3 and not any(isinstance(linear[name], Float8) for name in routers)
    assert isinstance(linear["layers.1.moe.shared_experts.w1"], Float8)
    assert isinstance(linear["mtp.heads.0.eh_proj"], Float8)


def test_filtered_layers_stay():
    found = kinds("sequential", filter_fqns=["attention", "mtp.heads.1"])
    for name, converted in found.items():
        kept = "attention" in name or "mtp.heads.1" in name or name == "output"
        assert converted == (not kept), name


def converted(shape, **keys) -> set[str]:
    """The float8 layers of the first block, and of others, of a model on the meta device."""
    model = build_model(replace(ARGS, n_layers=1, **shape))
    convert_to_float8(model, Float8Linear(**keys))
    names = (n for n, m in model.named_modules() if isinstance(m, Float8))
    return {name.removeprefix("layers.0.") for name in names}


LARGE = {"dim": 2048, "n_heads": 16, "n_kv_heads": 4, "hidden_dim": 5632}
OUTER = {"feed_forward.w1", "feed_forward.w3"}  # 5632 x 2048


@pytest.mark.parametrize(
    ("recipe", "filters", "expected"),
    [
        # torchao: too small are N <= 1024 with K <= 4096, of [N, K]; here wk and wv of 512 x 2048.
        (None, [], {"attention.wq", "attention.wo", "feed_forward.w2", *OUTER}),
        ("tensorwise", ["w2"], {"attention.wq", "attention.wo", *OUTER}),
        # rowwise: N <= 2048, or K <= 1024, or both N <= 4096 and K <= 2048.
        ("rowwise", [], OUTER),
    ],
)
def test_layers_too_small_to_gain_stay(recipe, filters, expected):
    auto = ["auto_filter_small_kn", *filters]
    assert converted(LARGE, recipe_name=recipe, filter_fqns=auto) == expected


def test_filters_that_keep_nothing_are_refused():
    # TorchTitan's recipes: what stays in any model needs no place in this one.
    assert converted(LARGE, filter_fqns=["output", "moe.router.gate"]) > {"attention.wk"}
    assert converted(LARGE, filter_fqns=["output", "router.gate"]) > {"attention.wk"}
    for entry, nearest in (
        ("atention.wq", "attention.wq"),
        ("auto_filter_smal_kn", "auto_filter_small_kn"),
        ("feed_forward.w4", "feed_forward.w"),
        ("", None),
        ("router.bias", None),
    ):
        end = f"; did you mean '{nearest}.*" if nearest else "; take it out"
        told = f"filter_fqns names '{entry}', which no linear layer's name contains{end}$"
        with pytest.raises(UserError, match=told):
            converted(LARGE, filter_fqns=["output", entry])
    with pytest.raises(UserError, match="leave no linear layer for it"):
        converted({"dim": 64}, filter_fqns=["auto_filter_small_kn"])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float8_learns_about_the_same(family, recipe, tmp_path):
    keys = FAMILIES[family]
    plain = train(config_of(tmp_path / "a", keys, {"training.steps": 4}))
    run = train(config_of(tmp_path / "b", keys, FLOAT8, {RECIPE: recipe}))
    assert run.losses != plain.losses
    torch.testing.assert_close(run.losses, plain.losses, rtol=0.02, atol=0)
    assert run.weights.keys() == plain.weights.keys()


def test_checkpoints_hold_plain_weights(tmp_path):
    """Resumed to the bit; and read by a model without float8."""
    saves = {
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        "checkpoint.last_save_model_only": False,
    }
    whole = train(config_of(tmp_path / "a", FLOAT8))
    train(config_of(tmp_path / "b", FLOAT8, saves), interrupt_after(2))
    second = train(config_of(tmp_path / "b", FLOAT8, saves))
    assert second.start == 2 and same(second.weights, whole.weights)
    load = {"checkpoint.enable": True, "checkpoint.initial_load_path": str(tmp_path / "b" / "run")}
    seen = {}

    def look(trainer):
        seen.update({n: p.full_tensor().clone() for n, p in trainer.model.named_parameters()})
        trainer.state.step = trainer.config.training.steps

    train(config_of(tmp_path / "c", load), look)
    assert same(seen, whole.weights)


def test_precomputed_scales_go_with_the_float8_gather(tmp_path):
    asked = {"quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True}
    with pytest.raises(UserError, match=r"enable_fsdp_float8_all_gather = true"):
        float8_scales_after_step(config_of(tmp_path, FLOAT8, asked))
    assert float8_scales_after_step(config_of(tmp_path, FLOAT8)) is None
    assert float8_scales_after_step(config_of(tmp_path, asked)) is None  # float8 is not in use
    both = {**asked, "quantize.linear.float8.enable_fsdp_float8_all_gather": True}
    assert float8_scales_after_step(config_of(tmp_path, FLOAT8, both)) is not None
