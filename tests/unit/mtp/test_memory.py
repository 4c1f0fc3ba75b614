"""Bytes alive in a step, counted at every allocation: what heads add to a plain model's peak."""

from __future__ import annotations

import pytest
import torch

from tests.allocations import most_alive
from tests.small import small_model
from torchtitan_mtp.config import MTP, ActivationCheckpoint
from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.ops import LossOptions

SEQ, DIM, VOCAB = 64, 32, 8192
STATE = 4 * SEQ * DIM  # bytes of one [N, D] in float32
LOGITS = 4 * SEQ * VOCAB


def peak(n: int, mode: str, **table) -> int:
    """Most bytes that a step has alive above parameters and gradients, which are there already."""
    mtp = MTP(num_future_tokens=n, **table)
    shape = {"dim": DIM, "vocab_size": VOCAB, "attn_mask_type": "causal", "max_seq_len": SEQ}
    model = small_model(mtp, **shape)
    apply_activation_checkpointing(model, ActivationCheckpoint(mode=mode), mtp.engine)
    tokens = torch.randint(VOCAB, (1, SEQ + n), generator=torch.Generator().manual_seed(0))
    batch = make_batch(Window(tokens, torch.zeros_like(tokens)), n, mtp.target == "trunk")
    scales = torch.full((n,), 1 / SEQ)
    options = LossOptions(target_loss=mtp.target_loss if mtp.target == "trunk" else None)
    ENGINES[mtp.engine](model, batch, scales, options, True)
    return most_alive(lambda: ENGINES[mtp.engine](model, batch, scales, options, True))


CASES = {  # [mtp] table, activation checkpointing, [N, D] for each head at most
    "parallel, head by head": ({"engine": "head_by_head"}, "none", 0),
    "parallel, head by head, checkpointed": ({"engine": "head_by_head"}, "full", 0),
    "parallel, joint": ({"engine": "joint"}, "none", 1),
    "parallel, joint, checkpointed": ({"engine": "joint"}, "full", 1),
    "medusa, head by head": ({"heads": "medusa"}, "none", 0),
    "medusa, joint": ({"heads": "medusa", "engine": "joint"}, "none", 1),
    "chain": ({"heads": "sequential"}, "none", 1),
    "chain, checkpointed": ({"heads": "sequential"}, "full", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_head_keeps(name):
    table, mode, states = CASES[name]
    plain, four, eight = peak(1, mode), peak(4, mode, **table), peak(8, mode, **table)
    assert plain > LOGITS  # the loss is where most is alive
    few = STATE / 2  # labels, a chain's tokens ahead
    assert eight - four <= 4 * states * STATE + few
    # Head by head, the engine itself has the trunk state's gradient in float32; and a light head's
    # activations come on top of the trunk's, where another head's take those of the last layer's.
    own = 3 if table.get("heads") == "medusa" else 2
    assert eight - plain <= max(8 * states, own) * STATE + few
    if states:
        assert eight - four > 4 * (states - 1) * STATE  # as the table in the docs says


@pytest.mark.parametrize("name", [name for name in CASES if "checkpointed" not in name])
def test_heads_that_learn_from_the_trunk_keep_no_more(name):
    """But its state and the chunk of its logits, once."""
    table, mode, states = CASES[name]
    four, eight = (peak(n, mode, target="trunk", **table) for n in (4, 8))
    assert eight - four <= 4 * states * STATE + STATE / 2


def test_no_second_gradient_of_the_unembedding():
    """What accumulates goes where it stays: a step keeps less than its logits and [V, D]."""
    assert peak(1, "full") < LOGITS + 4 * VOCAB * DIM
