"""What a crash, a broken disk or a hostile file does: nothing silently."""

import json
import pickle
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_run import Run, TinyModel, equal, snapshot

from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


@pytest.fixture
def saved(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    run.train(2)
    run.checkpointer.save(4)
    return run


def step_4(folder: Path, name: str) -> Path:
    return folder / "checkpoint" / "step-4" / name


def assert_refused(folder, match):
    """Resuming names the trouble in one line and never falls back by itself; asked to, it does."""
    with pytest.raises(UserError, match=match) as error:
        Run(folder).checkpointer.load()
    assert "\n" not in str(error.value)
    if "damaged" in match or "missing" in match:
        assert str(error.value).endswith("or load another step (checkpoint.load_step)")
        (folder / "checkpoint" / "step-2").rename(folder / "kept")
        with pytest.raises(
            UserError, match=r"or start anew in another folder \(job\.dump_folder\)"
        ):
            Run(folder).checkpointer.load()
        (folder / "kept").rename(folder / "checkpoint" / "step-2")
    assert Run(folder, load_step=2).checkpointer.load() == 2


FILES = ["__0_0.distcp", ".metadata", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(tmp_path, saved, name):
    file = step_4(tmp_path, name)
    content = bytearray(file.read_bytes())
    for position in range(0, len(content), max(1, len(content) // 7)):
        content[position] ^= 4
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: ") as error:
            Run(tmp_path).checkpointer.load()
        assert "\n" not in str(error.value)
        content[position] ^= 4
    file.write_bytes(content)
    assert Run(tmp_path).checkpointer.load() == 4


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("length", [0, 100])
def test_truncated_file_is_named(tmp_path, saved, name, length):
    file = step_4(tmp_path, name)
    file.write_bytes(file.read_bytes()[:length])
    assert_refused(tmp_path, rf"{name}: {length} bytes, expected \d+: damaged")


@pytest.mark.parametrize("name", FILES[:2])
def test_missing_file_is_named(tmp_path, saved, name):
    step_4(tmp_path, name).unlink()
    assert_refused(tmp_path, rf"{name}: missing, but manifest.json lists it")


def as_format_1(step: Path) -> None:
    """Rewrite a step's manifest as it was before files were summed up piece by piece."""
    file = step / "manifest.json"
    body = json.loads(file.read_text())
    body = {key: value for key, value in body.items() if key not in ("sha256", "piece")}
    body["format"] = 1
    for name, entry in body["files"].items():
        content = (step / name).read_bytes()
        body["files"][name] = {"bytes": entry["bytes"], "sha256": sha256(content).hexdigest()}
    digest = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(body | {"sha256": digest}))


def test_earlier_checkpoints_load_and_are_checked(tmp_path, saved):
    as_format_1(tmp_path / "checkpoint" / "step-4")
    run = Run(tmp_path)
    assert run.checkpointer.load() == 4
    assert equal(snapshot(run), snapshot(saved))
    shard = step_4(tmp_path, "__0_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert_refused(tmp_path, r"__0_0\.distcp: its SHA-256 is not the manifest's")


def test_torchs_advice_to_run_what_is_in_a_file_is_not_passed_on(tmp_path, saved):
    step_4(tmp_path, "manifest.json").unlink()
    shard = step_4(tmp_path, "__0_0.distcp")
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"can't be read: ") as error:
        Run(tmp_path).checkpointer.load()
    assert "weights_only" not in str(error.value)


def test_a_manifest_that_is_nested_too_deeply(tmp_path, saved):
    step_4(tmp_path, "manifest.json").write_text("[" * 100_000)
    assert_refused(tmp_path, r"manifest\.json: not a manifest \(maximum recursion depth exceeded")


def test_truncation_is_noticed_without_a_manifest(tmp_path, saved):
    step_4(tmp_path, "manifest.json").unlink()
    file = step_4(tmp_path, "__0_0.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(tmp_path, r"__0_0.distcp: \d+ bytes, expected at least \d+: truncated")


def test_resumes_without_a_manifest_but_says_so(tmp_path, saved, caplog):
    step_4(tmp_path, "manifest.json").unlink()
    run = Run(tmp_path, seed=1)
    assert run.checkpointer.load() == 4
    assert equal(snapshot(run), snapshot(saved))
    assert "can't be verified" in caplog.text


def test_damaged_step_is_kept_aside_when_its_turn_comes_again(tmp_path, saved):
    step_4(tmp_path, "__0_0.distcp").write_bytes(b"")
    run = Run(tmp_path, load_step=2)
    run.checkpointer.load()
    run.train(2)
    assert run.checkpointer.save(4)
    assert step_4(tmp_path, "manifest.json").is_file()
    assert (tmp_path / "checkpoint" / "step-4.damaged").is_dir()
    assert Run(tmp_path).checkpointer.load() == 4


def test_leftovers_of_interrupted_saves_are_ignored_then_replaced(tmp_path, saved, caplog):
    tmp = tmp_path / "checkpoint" / "step-6.tmp"
    shutil.copytree(tmp_path / "checkpoint" / "step-4", tmp)
    (tmp / "stray").write_text("x")
    (tmp_path / "checkpoint" / "step-8").mkdir()
    run = Run(tmp_path)
    assert run.checkpointer.load() == 4
    assert "step-6.tmp: left by an interrupted save, ignored" in caplog.text
    assert "step-8: neither .metadata nor manifest: not finished, ignored" in caplog.text
    run.train(2)
    run.checkpointer.save(6)
    assert not tmp.exists()
    assert not step_4(tmp_path, "../step-6/stray").exists()
    assert Run(tmp_path).checkpointer.load() == 6


@pytest.mark.slow
def test_killed_at_any_moment_the_last_good_checkpoint_loads(tmp_path):
    script = Path(__file__).with_name("killed_saves.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-1]) >= 10  # kills at that many different moments


class Payload:
    """Unpickled without care, it writes the canary file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.write_text, (Path(self.canary), "ran"))


def test_malicious_metadata_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(UserError, match=r"\.metadata: not the metadata of a DCP checkpoint"):
        load_model_weights(folder, TinyModel())
    assert not canary.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert canary.exists()  # the payload does work


def test_malicious_object_in_a_shard_does_not_run(tmp_path, saved):
    canary = tmp_path / "canary"
    states = {name: value.detach() for name, value in saved.model.state_dict().items()}
    states |= {"train_state": Payload(canary), "lr_scheduler": saved.schedule.state_dict()}
    states["optimizer.state"] = torch.zeros(1)  # makes it a full checkpoint
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(states, checkpoint_id=tmp_path / "checkpoint" / "step-6", planner=planner)
    run = Run(tmp_path, load_step=6, seed=1)
    run.checkpointer.optimizer = None
    with pytest.raises(UserError, match=r"step-6: can't be read: .*train_state") as error:
        run.checkpointer.load()
    assert "\n" not in str(error.value)
    assert not canary.exists()


def test_paths_that_leave_the_folder_are_refused(tmp_path, saved):
    step_4(tmp_path, "manifest.json").unlink()
    step_4(tmp_path, "__0_0.distcp").rename(tmp_path / "checkpoint" / "elsewhere")
    file = step_4(tmp_path, ".metadata")
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    file.write_bytes(pickle.dumps(metadata))
    assert_refused(tmp_path, r"names the file '../elsewhere', expected a bare name")


def test_metadata_of_every_tensor_type_passes_the_allow_list(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
    model = torch.nn.Module()
    for dtype in (*dtypes, torch.float8_e4m3fn):
        model.register_buffer("of_" + str(dtype).split(".")[1], torch.ones(2, dtype=dtype))
    dcp.save(dict(model.state_dict()), checkpoint_id=tmp_path / "step-1")
    for buffer in model.buffers():
        buffer.zero_()
    load_model_weights(tmp_path / "step-1", model)
    assert all(bool((buffer.to(torch.float32) == 1).all()) for buffer in model.buffers())
