"""What no tensor tells is recorded with every checkpoint, and differences from it are said."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_run import Run

from formats_run import QWEN, write_run
from runs import TINY, config_of, interrupt_after, same, train
from small import ARGS, DEEPSEEK, small_model
from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.checkpoint.record import constants, record_of, spec_of_record, untold
from torchtitan_mtp.config import MTP, JobConfig, to_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.inference.load import load_for_inference
from torchtitan_mtp.models.args import ModelArgs, ModelSpec, RoPEScaling, YaRN
from torchtitan_mtp.models.flavors import EARLIER_FLAVORS, flavors
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import Transformer, build_model

CHAIN = MTP(heads="sequential", num_future_tokens=3, share_weights=True)
SCALED = replace(DEEPSEEK, rope_scaling=YaRN(factor=8.0))
# Changes that leave every tensor's name and shape as it was.
MODELS = [
    (ARGS, {"n_heads": 2, "n_kv_heads": 1}, "model.args.n_heads = 4, this run has 2"),
    (ARGS, {"norm_eps": 1e-6}, "model.args.norm_eps = 1e-05, this run has 1e-06"),
    (ARGS, {"final_norm_eps": 1e-6}, "final_norm_eps = 1e-05, this run has 1e-06"),
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


def test_another_softcap(tmp_path, caplog):
    """It changes what the logits are: refused, told of weights; old records say nothing."""
    step = saved(tmp_path, ARGS)
    model = small_model(CHAIN)
    model.softcap = 30.0
    with pytest.raises(UserError, match=r'loss.softcap = "none", this run has 30.0; set it as'):
        Run(tmp_path, model=model).checkpointer.load()
    load_model_weights(tmp_path, model)
    assert 'trained with loss.softcap = "none", this run has 30.0: adapted' in caplog.text
    without_record(step, "softcap")
    assert Run(tmp_path, model=model).checkpointer.load() == 2


def test_another_optimizer(tmp_path):
    saved(tmp_path, ARGS)
    run = Run(tmp_path, model=small_model(CHAIN))
    run.checkpointer.optimizer = torch.optim.Adam(run.model.parameters())
    with pytest.raises(UserError, match=r'name = "AdamW", this run has "Adam"; .*optimizer'):
        run.checkpointer.load()
    run.checkpointer.config.exclude_from_loading = ["optimizer"]
    assert run.checkpointer.load() == 2


def test_every_constant_is_compared_or_told_by_shapes():
    """A new field of ModelArgs has to be one or the other."""
    told = {"dim", "n_layers", "vocab_size", "multiple_of", "ffn_dim_multiplier", "hidden_dim"}
    told |= {"qk_norm", "qkv_bias", "tied_embeddings", "max_seq_len"}
    keys = constants(record_of(ModelSpec(ARGS))) | constants(record_of(ModelSpec(SCALED)))
    compared = {key.removeprefix("model.").removeprefix("args.").split(".")[0] for key in keys}
    assert {field.name for field in fields(ModelArgs)} - told <= compared


def test_every_flavor_comes_back_from_its_record():
    for family in flavors.values():
        for args in family.values():
            spec = ModelSpec(args)
            assert spec_of_record(json.loads(json.dumps(record_of(spec)))) == spec


def without_record(step: Path, key: str = "") -> None:
    """As checkpoints were written before there was a record, or before it had a key."""
    body = json.loads((step / "manifest.json").read_text())
    del (body["record"] if key else body)[key or "record"], body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (step / "manifest.json").write_text(json.dumps(body | {"sha256": digest}))


def test_without_a_record_the_configuration_beside_it_tells(tmp_path):
    saves = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 4}
    train(config_of(tmp_path, saves), interrupt_after(2))
    step = tmp_path / "run" / "checkpoint" / "step-2"
    assert read_manifest(step).record is not None
    without_record(step)
    with pytest.raises(
        UserError, match=r"rope_theta = 10000.0, this run has 500000.0; set it as it was"
    ):
        train(config_of(tmp_path, saves, {"model.args.rope_theta": 5e5}))
    again = train(config_of(tmp_path, saves))
    whole = train(config_of(tmp_path / "whole", {"training.steps": 4}))
    assert again.start == 2 and same(again.weights, whole.weights)
    (tmp_path / "run" / "config.toml").write_text(to_toml(JobConfig()).replace("llama3", "other"))
    train(config_of(tmp_path, saves, {"model.args.rope_theta": 5e5, "checkpoint.load_step": 2}))


def test_a_run_keeps_what_its_flavor_had(tmp_path, monkeypatch, caplog):
    """Begun before the flavor's numbers changed: resumed twice, read and exported as it was."""
    saves = {"checkpoint.enable": True, "checkpoint.interval": 1, "training.steps": 4}
    whole = train(config_of(tmp_path / "whole", {"training.steps": 4}))
    train(config_of(tmp_path, saves), interrupt_after(2))
    without_record(tmp_path / "run" / "checkpoint" / "step-2")
    scaling = RoPEScaling(8.0, original_max_seq_len=16)
    monkeypatch.setitem(flavors["llama3"], "tiny", replace(TINY, rope_scaling=scaling))
    monkeypatch.setitem(EARLIER_FLAVORS, ("llama3", "tiny"), {"rope_scaling": None})
    train(config_of(tmp_path, saves), interrupt_after(3))  # and step-3 has a record
    told = "from before llama3 tiny had TorchTitan's numbers; keeps rope_scaling = None"
    assert caplog.text.count(told) == 1
    again = train(config_of(tmp_path, saves))
    assert again.start == 3 and same(again.weights, whole.weights)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint" / "step-2"):
        assert load_for_inference(path)[0].args.rope_scaling is None
    spec = export_checkpoint(tmp_path / "run", tmp_path / "out", "llama_hf", drop_heads=True)
    assert spec.args.rope_scaling is None
    # A new run has the new numbers, and so has what it leaves.
    train(config_of(tmp_path / "new", saves))
    assert load_for_inference(tmp_path / "new" / "run")[0].args.rope_scaling == scaling


def foreign(folder: Path, **changes: object) -> Transformer:
    """A folder as TorchTitan leaves it: nothing but tensors."""
    model = build_model(replace(ARGS, **changes)).to_empty(device="cpu")
    init_weights(model, 0)
    dcp.save(model.state_dict(), checkpoint_id=folder / "step-3", no_dist=True)
    return model


def test_folders_that_do_not_say_their_model(tmp_path, caplog):
    """TorchTitan's llama3 is warned of; its Qwen3, whose heads turn other pairs, is refused."""
    model = foreign(tmp_path / "llama", rope_scaling=RoPEScaling(8.0))
    load_model_weights(tmp_path / "llama", model)
    told = caplog.text.partition("taken for one with ")[2].partition(";")[0].split(", ")
    assert [entry.removeprefix("model.").removeprefix("args.") for entry in told] == [
        *("n_heads = 4", "head_size = 4", "norm_eps = 1e-05", "rope_theta = 10000.0"),
        *("rope_scaling.factor = 8.0", "rope_scaling.low_freq_factor = 1.0"),
        *("rope_scaling.high_freq_factor = 4.0", "rope_scaling.original_max_seq_len = 8192"),
        *('rope_scaling.rope_type = "llama3"', "final_norm_eps = 1e-05"),
        *('attn_mask_type = "block_causal"', 'loss.softcap = "none"'),
    ]
    said = untold(record_of(ModelSpec(DEEPSEEK)))
    for key in ("top_k", "num_expert_groups", "num_limited_groups", "score_func"):
        assert f"moe.{key} = " in said
    assert "moe.route_norm = " in said and "moe.route_scale = " in said
    assert not any(f".{key} = " in said for key in ("num_experts", "hidden_dim", "kv_lora_rank"))
    model = foreign(tmp_path / "qwen", qk_norm=True)
    message = (
        r"step-3: not of a run here; TorchTitan's Qwen3 .*torchtitan-mtp-import --format torch"
    )
    with pytest.raises(UserError, match=message):
        load_model_weights(tmp_path / "qwen", model)
    # Nor is our own export in that layout taken for a run's, wherever it lies.
    run = tmp_path / "run"
    model, _ = write_run(run, **QWEN)
    load_model_weights(run, model)
    export_checkpoint(run, run / "export", "torchtitan")
    assert "TorchTitan's flavor has to have model.args.n_heads = " in caplog.text
    with pytest.raises(UserError, match=r"export: not of a run here"):
        load_model_weights(run / "export", model)
    (tmp_path / "run.toml").write_text((run / "config.toml").read_text())
    source, config = run / "export", tmp_path / "run.toml"
    import_checkpoint(source, tmp_path / "back", "torchtitan", config_file=config)
    assert "taken for a model with model.args.n_heads = " in caplog.text
    again = copy.deepcopy(model)
    load_model_weights(tmp_path / "back", again)
    assert same(again.state_dict(), model.state_dict())
