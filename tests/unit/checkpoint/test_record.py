"""What no tensor tells is recorded with every checkpoint, and differences from it are said."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_run import Run

from runs import config_of, interrupt_after, same, train
from small import ARGS, DEEPSEEK, small_model
from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.checkpoint.formats.spec import ModelSpec
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.checkpoint.origin import find_origin
from torchtitan_mtp.checkpoint.record import record_of, spec_of_record
from torchtitan_mtp.config import MTP, JobConfig, to_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import RoPEScaling, YaRN
from torchtitan_mtp.models.flavors import flavors

CHAIN = MTP(heads="sequential", num_future_tokens=3, share_weights=True)
SCALED = replace(DEEPSEEK, rope_scaling=YaRN(factor=8.0))
# Changes that leave every tensor's name and shape as it was.
MODELS = [
    (ARGS, {"n_heads": 2, "n_kv_heads": 1}, "model.args.n_heads = 4, this run has 2"),
    (ARGS, {"norm_eps": 1e-6}, "model.args.norm_eps = 1e-05, this run has 1e-06"),
    (
        ARGS,
        {"attn_mask_type": "causal"},
        'attn_mask_type = "block_causal", this run has "causal"',
    ),
    (ARGS, {"rope_theta": 5e5}, "model.args.rope_theta = 10000.0, this run has 500000.0"),
    (ARGS, {"rope_scaling": RoPEScaling()}, "rope_scaling.factor = 1.0, this run has 8.0"),
    (SCALED, {"rope_scaling": None}, "rope_scaling.factor = 8.0, this run has 1.0"),
    (SCALED, {"moe": replace(DEEPSEEK.moe, top_k=2)}, "model.args.moe.top_k = 3, this run has 2"),
]
HEADS = [
    ({"trunk_state": "raw"}, 'mtp.trunk_state = "normalized", this run has "raw"'),
    ({"num_future_tokens": 4}, "mtp.num_future_tokens = 3, this run has 4"),
    ({"num_future_tokens": 2, "share_weights": False}, "mtp.share_weights = true, this run has"),
]


def saved(folder: Path, shape, mtp=CHAIN) -> Path:
    Run(folder, model=small_model(mtp, shape=shape)).checkpointer.save(2)
    return folder / "checkpoint" / "step-2"


@pytest.mark.parametrize(("shape", "changes", "told"), MODELS, ids=lambda x: None)
def test_other_constants_are_refused_or_told(tmp_path, caplog, shape, changes, told):
    step = saved(tmp_path / "run", shape)
    assert spec_of_record(read_manifest(step).record).args == shape
    assert Run(tmp_path / "run", model=small_model(CHAIN, shape=shape)).checkpointer.load() == 2
    other = replace(shape, **changes)
    with pytest.raises(UserError) as error:
        Run(tmp_path / "run", model=small_model(CHAIN, shape=other)).checkpointer.load()
    assert told in str(error.value) and "\n" not in str(error.value)
    # Weights to start another run from, or to decode with: a longer context is somebody's wish.
    model = small_model(CHAIN, shape=other)
    adapted = any(key.startswith("rope") for key in changes)
    with caplog.at_level(logging.WARNING):
        if adapted or "attn_mask_type" in changes:
            load_model_weights(tmp_path / "run", model)
        else:
            with pytest.raises(UserError, match=r"set it as it was$"):
                load_model_weights(tmp_path / "run", model)
    assert (told in caplog.text) == adapted


@pytest.mark.parametrize(("changes", "told"), HEADS, ids=lambda x: None)
def test_heads_that_are_joined_otherwise(tmp_path, changes, told):
    saved(tmp_path, ARGS)
    other = small_model(replace(CHAIN, **changes))
    with pytest.raises(UserError, match=told):
        Run(tmp_path, model=other).checkpointer.load()
    load_model_weights(tmp_path, small_model(CHAIN))
    excluded = Run(tmp_path, model=other, exclude_from_loading=["mtp", "optimizer"])
    assert excluded.checkpointer.load() == 2


def test_another_optimizer(tmp_path):
    saved(tmp_path, ARGS)
    run = Run(tmp_path, model=small_model(CHAIN))
    run.checkpointer.optimizer = torch.optim.Adam(run.model.parameters())
    with pytest.raises(UserError, match=r'name = "AdamW", this run has "Adam"; .*optimizer'):
        run.checkpointer.load()
    run.checkpointer.config.exclude_from_loading = ["optimizer"]
    assert run.checkpointer.load() == 2


def test_every_flavor_comes_back_from_its_record():
    for family in flavors.values():
        for args in family.values():
            spec = ModelSpec(args)
            assert spec_of_record(json.loads(json.dumps(record_of(spec)))) == spec


def without_record(step: Path) -> None:
    """As checkpoints were written before there was a record."""
    body = json.loads((step / "manifest.json").read_text())
    del body["record"], body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (step / "manifest.json").write_text(json.dumps(body | {"sha256": digest}))


def test_without_a_record_the_configuration_beside_it_tells(tmp_path):
    saves = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 4}
    config = config_of(tmp_path, saves)
    assert find_origin(config).checkpoint is None and not find_origin(config).unrecorded
    train(config, interrupt_after(2))
    step = tmp_path / "run" / "checkpoint" / "step-2"
    assert find_origin(config).record == read_manifest(step).record
    without_record(step)
    assert find_origin(config).checkpoint == step and find_origin(config).unrecorded
    with pytest.raises(
        UserError, match=r"rope_theta = 10000.0, this run has 500000.0; set it as it was"
    ):
        train(config_of(tmp_path, saves, {"model.args.rope_theta": 5e5}))
    again = train(config_of(tmp_path, saves))
    whole = train(config_of(tmp_path / "whole", {"training.steps": 4}))
    assert again.start == 2 and same(again.weights, whole.weights)
    (tmp_path / "run" / "config.toml").write_text(to_toml(JobConfig()).replace("llama3", "other"))
    train(config_of(tmp_path, saves, {"model.args.rope_theta": 5e5, "checkpoint.load_step": 2}))
