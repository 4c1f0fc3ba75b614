"""What is computed again in the backward: counted, not believed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small import ARGS, named_gradients, small_model, small_window
from torchtitan_mtp.config import MTP, ActivationCheckpoint, Float8Linear
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.distributed.float8 import convert_to_float8
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import build_model

N = 3


class Count(TorchDispatchMode):
    """Operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(heads, engine="head_by_head", **config):
    """Operations of the forward, of the backward, and the gradients by name."""
    model = small_model(MTP(heads=heads, num_future_tokens=N), attn_mask_type="causal")
    if engine != "plain":
        apply_activation_checkpointing(model, ActivationCheckpoint(**config), engine)
    batch = make_batch(small_window(2, 11), N)
    with Count() as forward:
        hiddens = model(batch)
    loss = sum(h.square().sum() for h in hiddens)
    with Count() as backward:
        loss.backward()
    return forward.seen, backward.seen, named_gradients(model)


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
BLOCKS = 5
# Matrix products of the blocks: a module of a chain has its projection as well.
PRODUCTS = {"parallel": [7, 7, 7, 7, 7], "sequential": [7, 7, 7, 8, 8]}


@pytest.mark.parametrize(
    ("heads", "engine"),
    [("parallel", "head_by_head"), ("parallel", "joint"), ("sequential", "head_by_head")],
)
@pytest.mark.parametrize("option", ["none", "full", "1", "2", "op"])
def test_what_is_computed_again(heads, engine, option):
    mode = option if option in ("none", "full") else "selective"
    config = {"mode": mode, "selective_ac_option": "2" if mode == option else option}
    products = PRODUCTS[heads]
    again = {  # attentions and matrix products of each block in the backward
        "none": [(0, 0)] * BLOCKS,
        "full": [(1, p) for p in products],
        "1": [(1, p) for p in products],
        "2": [(1, p) if i % 2 == 0 else (0, 0) for i, p in enumerate(products)],
        "op": [(0, p // 2) for p in products],  # every second
    }[option]
    if engine == "joint" or heads == "sequential":  # such heads are held, and checkpointed whole
        again[1 - N :] = [(1, p) for p in products[1 - N :]]
    forward, plain, expected = step(heads, "plain", mode="none")
    assert forward[ATTENTION] == BLOCKS
    forward, backward, gradients = step(heads, engine, **config)
    assert forward[ATTENTION] == BLOCKS
    found = backward[ATTENTION], backward["mm"] - plain["mm"]
    assert found == tuple(map(sum, zip(*again, strict=True)))
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert gradients.keys() == expected.keys()  # no wrapper in the names


@pytest.mark.parametrize(("heads", "spared"), [("parallel", 2), ("sequential", 3)])
def test_early_stop_spares_last_products(heads, spared):
    """Nothing needs the product that ends a block, but where a norm follows in it."""
    _, plain, _ = step(heads, "plain", mode="none")
    _, backward, _ = step(heads, mode="full", early_stop=True)
    assert backward["mm"] - plain["mm"] == sum(PRODUCTS[heads]) - spared


def test_nothing_is_wrapped_without_gradients():
    model = small_model(MTP(num_future_tokens=N))
    apply_activation_checkpointing(model, ActivationCheckpoint(mode="full"))
    with torch.no_grad(), Count() as count:
        model(make_batch(small_window(2, 11), N))
    assert count.seen["mm"] == sum(PRODUCTS["parallel"])


RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
LINEARS = 7  # of a block


def float8_block(recipe, mode):
    """A model with one block, all of whose linear layers are float8."""
    model = build_model(replace(ARGS, n_layers=1, dim=64, n_kv_heads=4))
    convert_to_float8(model, Float8Linear(recipe_name=recipe))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    init_weights(model, 0)
    apply_activation_checkpointing(model, ActivationCheckpoint(mode=mode, selective_ac_option="op"))
    return model


def losses_of(model):
    return model(make_batch(small_window(2, 17), 1))[0].float().square().sum()


@pytest.mark.parametrize("recipe", RECIPES)
def test_selective_checkpointing_keeps_what_float8_scales_by(recipe):
    """Each product casts two tensors by their largest magnitudes, in the forward and for both of
    its gradients; what the backward computes again takes them from the forward."""
    gradients = 2 if recipe == "rowwise_with_gw_hp" else 4  # its weight's gradient casts nothing
    for mode, again in {"none": 0, "selective": 0, "full": 2 * LINEARS}.items():
        model = float8_block(recipe, mode)
        with Count() as forward:
            loss = losses_of(model)
        with Count() as backward:
            loss.backward()
        assert forward.seen["max"] + forward.seen["amax"] == 2 * LINEARS
        assert backward.seen["max"] + backward.seen["amax"] == gradients * LINEARS + again, mode
        if mode == "selective":
            assert backward.seen["mm"] == 2 * LINEARS + LINEARS // 2  # every second one again


def test_compiled_checkpointing_keeps_what_float8_scales_by():
    """As the compiler's graphs have it, with float8's own products: every tensor is reduced to its
    largest magnitude once in the forward, and in the backward only gradients are, and inputs for
    the gradients of weights, which torchao reshapes."""
    model, graphs = float8_block("tensorwise", "selective"), []
    for linear in model.modules():
        if hasattr(linear, "linear_mm_config"):  # as on a GPU
            linear.config = replace(linear.config, emulate=False)
            products = (product._replace(emulate=False) for product in linear.linear_mm_config)
            linear.linear_mm_config = type(linear.linear_mm_config)(*products)

    def count(graph, _):
        nodes = (node.target for node in graph.graph.nodes if node.op == "call_function")
        graphs.append(Counter(str(target) for target in nodes))
        return make_boxed_func(graph.forward)

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
    model.layers["0"].compile(backend=backend, fullgraph=True)
    losses_of(model).backward()
    forward, backward = graphs
    inputs = 4  # of wq, wk and wv; of wo; of w1 and w3; of w2
    assert forward["aten._scaled_mm.default"] == LINEARS
    assert forward["aten.max.default"] == LINEARS + inputs
    assert backward["aten._scaled_mm.default"] == 2 * LINEARS + LINEARS // 2
    assert backward["aten.max.default"] == LINEARS + inputs
