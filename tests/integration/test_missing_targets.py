"""Steps, heads and validations without a single target: nothing moves, and it is said."""

from __future__ import annotations

import json
import logging
import math

import pytest

from runs import HEAD_BY_HEAD, JOINT, SEQUENTIAL, config_of, same, train
from torchtitan_mtp.data.targets import IGNORE
from torchtitan_mtp.trainer import Trainer

NARROW = {"training.seq_len": 8, "training.local_batch_size": 1, "training.steps": 12}


def write(folder, **record):
    """The keys of a corpus of two such records, for training and for validation."""
    path = folder / f"{len(json.dumps(record))}.jsonl"
    path.write_text(2 * (json.dumps(record) + "\n"))
    names = {"training.dataset": "corpus", "validation.dataset": "corpus"}
    return names | {f"{part}.dataset_path": str(path) for part in ("training", "validation")}


def targets_of(trainer: Trainer) -> dict[int, int]:
    """Step -> targets of all heads in it, filled as the trainer trains."""
    engine, found = trainer.pieces.engine, {}

    def count(model, batch, *rest):
        found[trainer.state.step + 1] = int((batch.labels != IGNORE).sum())
        return engine(model, batch, *rest)

    trainer.pieces.engine = count
    return found


@pytest.mark.parametrize(
    ("implementation", "family"),
    [("fused", HEAD_BY_HEAD), ("fused", SEQUENTIAL), ("for-loop", JOINT)],
)
def test_a_step_without_a_target_is_no_update(implementation, family, tmp_path, caplog):
    """Prompts of 20 bytes fill whole windows of 8: equal, to the bit, to a run whose optimizer is
    not called at these steps."""
    keys = {**NARROW, **family, "optimizer.implementation": implementation}
    keys |= write(tmp_path, prompt="?" * 20, completion="!" * 6)
    counts: list[dict[int, int]] = []

    def skip(trainer: Trainer) -> None:
        counts.append(targets_of(trainer))
        update = trainer.optimizer.step

        def step_if_any_target() -> None:
            if counts[0][trainer.state.step + 1]:
                update()

        trainer.optimizer.step = step_if_any_target

    expected = train(config_of(tmp_path / "a", keys), skip)
    logging.getLogger("torchtitan_mtp").propagate = True
    caplog.clear()
    caplog.set_level(logging.INFO, logger="torchtitan_mtp")
    found = train(config_of(tmp_path / "b", keys))
    empty = [step for step, count in counts[0].items() if not count]
    full = [step for step, count in counts[0].items() if count]
    assert min(full) < max(empty)  # when there are moments already
    assert same(found.weights, expected.weights)
    for logged in found.logged:
        values = [*logged["head_losses"], logged["global_total_loss"], logged["global_max_loss"]]
        assert all(map(math.isnan, values)) or logged["step"] not in empty
        assert math.isnan(values[-2]) == (logged["step"] in empty)
    lines = [text for text in caplog.messages if text.startswith(f"step: {empty[0]:2}  ")]
    assert "  loss:       -  heads 2-3: - -  " in lines[0]
    assert "nan" not in caplog.text
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [text for text in warnings if "no target" in text] == [
        f"step {empty[0]} updates nothing: no target of any head: all that it could predict is "
        "prompt, which is no target"
    ]


def test_a_head_that_looks_beyond_every_document(tmp_path, caplog):
    """bos, one byte, eos: head 2 predicts eos from bos, heads 3 and 4 have nothing."""
    logging.getLogger("torchtitan_mtp").propagate = True
    keys = {**NARROW, **write(tmp_path, text="a"), "mtp.num_future_tokens": 4}
    validation = {"validation.enable": True, "validation.freq": 6, "validation.seq_len": 8}
    with caplog.at_level(logging.INFO, logger="torchtitan_mtp"):
        run = train(config_of(tmp_path, keys, validation, {"training.steps": 6}))
    for losses in [*run.losses, *run.validated]:
        assert [math.isnan(loss) for loss in losses] == [False, False, True, True]
    said = caplog.text
    assert "nan" not in said and " - -  grad_norm" in said and "% - -  acceptance: " in said
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    cause = "no target of head 3: no document here has more than 3 tokens"
    assert [text for text in warnings if "no target" in text] == [
        f"step 1: {cause}",
        f"validation after step 6: {cause}",
    ]


def test_a_validation_without_a_target(tmp_path, caplog):
    logging.getLogger("torchtitan_mtp").propagate = True
    keys = {**NARROW, **write(tmp_path, prompt="?" * 60, completion="!!"), "training.steps": 2}
    validation = {"validation.enable": True, "validation.freq": 2, "validation.seq_len": 8}
    one = {"validation.steps": 1, "validation.local_batch_size": 1}
    with caplog.at_level(logging.INFO, logger="torchtitan_mtp"):
        run = train(config_of(tmp_path, keys, validation, one))
    (losses,) = run.validated
    assert all(map(math.isnan, losses))
    (line,) = [text for text in caplog.messages if text.startswith("validate")]
    assert "loss:       -  heads 2-3: - -  accuracy: - - -  " in line
    assert "nan" not in caplog.text and "validation after step 2: no target of any" in caplog.text
