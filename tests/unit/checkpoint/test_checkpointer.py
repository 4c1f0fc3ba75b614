import random

import pytest
import torch
from tiny_model import Counter, Run, TinyModel, equal, snapshot

from torchtitan_mtp.errors import UserError


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("async_mode", ["disabled", "async", "async_with_pinned_mem"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, async_mode, tied):
    run = Run(tmp_path, async_mode=async_mode, tied=tied)
    run.train(2)
    assert run.checkpointer.save(2)
    saved = snapshot(run)
    expected = run.train(3), random.random()
    run.checkpointer.close()
    after = snapshot(run)

    resumed = Run(tmp_path, seed=1, tied=tied)
    assert not equal(snapshot(resumed), saved)
    assert resumed.checkpointer.load() == 2
    assert equal(snapshot(resumed), saved)
    assert (resumed.train(3), random.random()) == expected
    assert equal(snapshot(resumed), after)
    if tied:
        assert resumed.model.output.weight is resumed.model.tok_embeddings.weight
