"""Loading weights between models that differ in heads, dtype, ties and layout."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_run import DIM, VOCAB, Run, TinyModel, equal

from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


def write(folder, states):
    dcp.save(states, checkpoint_id=folder / "step-1")
    return folder


def detached(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("stored_heads", [0, 1, 2, 3])
@pytest.mark.parametrize("heads", [0, 1, 2, 3])
def test_common_heads_are_loaded_and_the_others_named(tmp_path, caplog, stored_heads, heads):
    caplog.set_level(logging.INFO)
    stored = detached(TinyModel(stored_heads, seed=1))
    model = TinyModel(heads, seed=2)
    before = detached(model)
    report = load_model_weights(write(tmp_path, stored), model)
    after = detached(model)
    assert set(report.missing) == before.keys() - stored.keys()
    assert set(report.unexpected) == stored.keys() - before.keys()
    for name, value in after.items():
        assert torch.equal(value, stored.get(name, before[name])), name
    assert ("start as mtp.init says" in caplog.text) is (heads > stored_heads)
    assert ("not in the model, dropped" in caplog.text) is (heads < stored_heads)


def test_full_checkpoint_of_a_run_loads_as_weights(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    model = TinyModel(heads=0, seed=1)
    report = load_model_weights(tmp_path, model)
    assert len(report.unexpected) == 4
    assert equal(detached(model), {n: run.model.state_dict()[n] for n in model.state_dict()})


def test_torchtitans_own_full_layout_loads(tmp_path):
    trunk = TinyModel(heads=0, seed=1)
    states = detached(trunk) | {
        "freqs_cis": torch.zeros(3),
        "optimizer": {f"state.{n}.exp_avg": v for n, v in detached(trunk).items()},
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"dp_rank_0": b"x"},
        "train_state": {"step": torch.tensor(3)},
    }
    model = TinyModel(seed=2)
    report = load_model_weights(write(tmp_path, states), model)
    assert report.unexpected == ()
    assert equal({n: detached(model)[n] for n in detached(trunk)}, detached(trunk))


def test_nested_model_key_of_old_checkpoints_loads(tmp_path):
    trunk = TinyModel(heads=0, seed=1)
    model = TinyModel(heads=0, seed=2)
    load_model_weights(write(tmp_path, {"model": detached(trunk)}), model)
    assert equal(detached(model), detached(trunk))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"lacks 1 \(norm.weight\) of the model"),
        ({"layers.7.wq.weight": torch.ones(1)}, r"holds 1 \(layers.7.wq.weight\), which the model"),
        (
            {"output.weight": torch.ones(VOCAB + 1, DIM)},
            r"output.weight has shape \(25, 16\), the model expects \(24, 16\)",
        ),
        ({"norm.weight": torch.ones(DIM, dtype=torch.int64)}, r"norm.weight is torch.int64"),
        ({"norm.weight": torch.ones(DIM, dtype=torch.float64)}, r"norm.weight is torch.float64"),
        ({"mtp.heads.1.wq.weight": None}, r"head mtp.heads.1 is of another kind"),
        ({"mtp.heads.0.eh_proj.weight": torch.ones(1)}, r"head mtp.heads.0 is of another kind"),
    ],
)
def test_mismatch_is_named(tmp_path, change, message):
    stored = {n: v for n, v in (detached(TinyModel()) | change).items() if v is not None}
    model = TinyModel(seed=1)
    before = detached(model)
    with pytest.raises(UserError, match=message) as error:
        load_model_weights(write(tmp_path, stored), model)
    assert "\n" not in str(error.value)
    assert equal(detached(model), before)


def test_exclusion_lets_mismatches_pass(tmp_path):
    stored = detached(TinyModel(seed=1)) | {"output.weight": torch.ones(VOCAB + 1, DIM)}
    del stored["mtp.heads.1.wq.weight"]
    model = TinyModel(seed=2)
    before = detached(model)
    load_model_weights(write(tmp_path, stored), model, exclude=["output", "mtp.heads.1"])
    after = detached(model)
    assert torch.equal(after["output.weight"], before["output.weight"])
    assert torch.equal(after["mtp.heads.1.norm.weight"], before["mtp.heads.1.norm.weight"])
    assert torch.equal(after["mtp.heads.0.wq.weight"], stored["mtp.heads.0.wq.weight"])
    load_model_weights(tmp_path, model, exclude=["model"])
    assert equal(detached(model), after)


def test_widening_is_exact_and_narrowing_is_asked_for(tmp_path):
    stored = {n: v.bfloat16() for n, v in detached(TinyModel(seed=1)).items()}
    write(tmp_path, stored)
    model = TinyModel(seed=2)
    assert set(load_model_weights(tmp_path, model).cast) == set(stored)
    assert equal(detached(model), {n: v.float() for n, v in stored.items()})

    other = write(tmp_path / "wide", detached(model))
    narrow = TinyModel(seed=2).bfloat16()
    with pytest.raises(UserError, match=r"is torch.float32, the model expects torch.bfloat16"):
        load_model_weights(other, narrow)
    load_model_weights(other, narrow, allow_cast=True)
    assert equal(detached(narrow), stored)


def test_tied_weights(tmp_path):
    tied = TinyModel(heads=0, tied=True, seed=1)
    once = detached(tied)
    del once["output.weight"]
    for states in (detached(tied), once):
        folder = write(tmp_path / str(len(states)), states)
        model = TinyModel(heads=0, tied=True, seed=2)
        assert load_model_weights(folder, model).missing == ()
        assert equal(detached(model), detached(tied))
    untied = TinyModel(heads=0, seed=2)
    with pytest.raises(UserError, match=r"lacks 1 \(output.weight\)"):
        load_model_weights(tmp_path / str(len(once)), untied)
    load_model_weights(tmp_path / str(len(once) + 1), untied)
    assert equal(detached(untied), detached(tied))
    different = write(tmp_path / "different", detached(TinyModel(heads=0, seed=3)))
    with pytest.raises(UserError, match=r"tok_embeddings.weight and output.weight differ"):
        load_model_weights(different, TinyModel(heads=0, tied=True))
