"""What is computed again in the backward: counted, not believed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small import named_gradients, small_model, small_window
from torchtitan_mtp.config import MTP, ActivationCheckpoint
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing

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
