"""Names, retention and which checkpoint a path means."""

import pytest
from checkpoint_run import Run

from torchtitan_mtp.checkpoint import find_checkpoint, folders
from torchtitan_mtp.errors import UserError


def finished(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / ".metadata").write_bytes(b"")
    return folder / name


def test_only_whole_names_are_steps(tmp_path):
    for name in ("step-2", "step-10", "step-100.bak", "old-step-300", "step-400.tmp", "step-5x"):
        finished(tmp_path, name)
    (tmp_path / "step-500").mkdir()  # never finished
    (tmp_path / "step-600").write_text("a file")
    assert folders.finished_steps(tmp_path) == [2, 10]
    assert folders.finished_steps(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("kinds", "keep", "removed"),
    [
        ("1f 2f 3f 4f", 2, [1, 2]),
        ("1f 2f 3f 4f", 0, []),
        ("1f 2f", 10, []),
        ("1f 2f 3m 4m", 2, [1]),  # 2 is the last full one
        ("1m 2m 3m", 2, [1]),
        ("2f 4f 100f 200f", 2, [2]),  # 4 has just been written, after going back
    ],
)
def test_which_steps_are_removed(kinds, keep, removed):
    kind = {"f": "full", "m": "model_only"}
    steps = {int(entry[:-1]): kind[entry[-1]] for entry in kinds.split()}
    assert folders.steps_to_remove(steps, keep, written=4) == removed


def test_damaged_steps_neither_count_nor_are_removed(tmp_path):
    run = Run(tmp_path, keep_latest_k=2)
    for step in (2, 4):
        run.checkpointer.save(step)
    shard = next((tmp_path / "checkpoint" / "step-4").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    run.checkpointer.save(6)
    run.checkpointer.save(8)
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [
        "step-4",
        "step-6",
        "step-8",
    ]


def test_find_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "typo")
    older, newer = (finished(tmp_path / "checkpoint", f"step-{n}") for n in (9, 10))
    assert find_checkpoint(older) == older
    assert find_checkpoint(str(tmp_path / "checkpoint")) == newer
    assert find_checkpoint(tmp_path) == newer
    imported = finished(tmp_path / "models", "converted")
    assert find_checkpoint(imported) == imported
    finished(tmp_path / "other", "step-50")
    assert find_checkpoint(tmp_path) == newer  # "checkpoint" is the usual name


@pytest.mark.parametrize("own", ["ckpt", "deep/er", "{elsewhere}"])
def test_a_run_says_where_its_checkpoints_are(tmp_path, own):
    """checkpoint.folder in its config.toml, of which there may be others beside it."""
    run, own = tmp_path / "run", own.format(elsewhere=tmp_path / "elsewhere")
    finished(run / "checkpoint", "step-50")
    (run / "config.toml").write_text(f'[checkpoint]\nfolder = "{own}"\n')
    assert find_checkpoint(run) == run / "checkpoint" / "step-50"  # none is finished there yet
    newer = finished(run / own, "step-3")
    assert find_checkpoint(run) == newer
    assert folders.find_config(run) == run / "config.toml"


def test_find_checkpoint_asks_when_it_cannot_tell(tmp_path):
    for name in ("a", "b"):
        finished(tmp_path / name, "step-1")
    with pytest.raises(UserError, match=r"several folders of checkpoints \(a, b\)"):
        find_checkpoint(tmp_path)
