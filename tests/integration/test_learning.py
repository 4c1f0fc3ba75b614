"""Every head of both families learns a small text by heart within seconds."""

from __future__ import annotations

import json

import pytest

from runs import DEEPSEEK, HEAD_BY_HEAD, JOINT, SEQUENTIAL, config_of, train

TEXT = "the quick brown fox jumps over the lazy dog while five wizards box "


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(JOINT, marks=pytest.mark.exhaustive),  # computes what head_by_head does
        HEAD_BY_HEAD,
        SEQUENTIAL,
        pytest.param({**SEQUENTIAL, "mtp.share_weights": True}, marks=pytest.mark.exhaustive),
        DEEPSEEK,
        pytest.param({"mtp.heads": "medusa"}, marks=pytest.mark.exhaustive),
    ],
    ids=["joint", "head_by_head", "chain", "shared chain", "experts", "medusa"],
)
def test_every_head_learns_a_text_by_heart(keys, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": TEXT * 30}) + "\n")
    settings = {
        "training.dataset": "text",
        "training.dataset_path": str(path),
        "training.steps": 80,
        "training.local_batch_size": 4,
        "optimizer.lr": 3e-2,
        "lr_scheduler.warmup_steps": 10,
        "metrics.log_freq": 80,
    }
    run = train(config_of(tmp_path, settings, keys))
    first, last = run.losses[0], run.losses[-1]
    assert all(loss > 5 for loss in first), first  # about log(320) before it has seen anything
    # A letter of this text tells 26 ways to go on apart, so a head that has not learned stays near
    # the entropy of single letters, 2.8 nats.
    for k, loss in enumerate(last, 1):
        assert loss < 0.5, f"head {k}: {last}"
    assert all(accuracy > 0.9 for accuracy in run.logged[-1]["head_accuracies"])
