"""Import without ceremony: formats found, models of the hub's cache, what other programs leave."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from formats_run import DEEPSEEK, PARALLEL, QWEN, QWEN2, RAW, SMALL, write_run
from torchtitan_mtp.cli import import_checkpoint as program
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.importing import find_folder


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("importing")
    write_run(folder / "run", **SMALL)
    export_checkpoint(folder / "run", folder / "hf", "llama_hf")
    return folder / "hf"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_hf", QWEN2),
        ("mellum_hf", QWEN),
        ("mimo_hf", QWEN2 | RAW),
        ("deepseek_v3_hf", DEEPSEEK),
        ("meta", SMALL | PARALLEL),
    ],
)
def test_a_format_is_found(tmp_path: Path, name: str, changes) -> None:
    write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "out", name)
    found = import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert found == import_checkpoint(tmp_path / "out", tmp_path / "again", name)


def hub_cache(folder: Path, model: Path, name: str = "models--org--tiny-1.0") -> Path:
    """As huggingface_hub lays it out: refs/main names a snapshot, whose files are links."""
    repo = folder / name
    shutil.copytree(model, repo / "blobs")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
    for file in (repo / "blobs").iterdir():
        (repo / "snapshots" / ("a" * 40) / file.name).symlink_to(file)
    return repo


def test_a_model_of_the_hubs_cache(tmp_path: Path, llama: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: find_folder("org/tiny-1.0"))
    assert "org/tiny-1.0: no such folder, nor " in message
    assert message.endswith("hub/models--org--tiny-1.0; try: hf download org/tiny-1.0")
    repo = hub_cache(tmp_path / "hub", llama)
    expected = snapshot_download("org/tiny-1.0", local_files_only=True)
    assert str(find_folder("org/tiny-1.0")) == str(find_folder(repo)) == expected
    assert program.main(["org/tiny-1.0", str(tmp_path / "out")]) == 0
    assert "3 layers, no further heads" in capsys.readouterr().out
    (repo / "refs" / "main").unlink()
    assert "name one of its 2 snapshots" in refusal(lambda: find_folder(repo))
    (repo / "snapshots" / ("b" * 40)).rmdir()
    assert find_folder(repo).name == "a" * 40
    assert "no such folder" in refusal(lambda: find_folder(tmp_path / "nowhere"))
