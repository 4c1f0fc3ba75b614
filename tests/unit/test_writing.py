"""Files are whole or absent, at whatever moment their writer dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.writing import check_writable, written_whole


@pytest.mark.parametrize("dies_at", ["write", "fsync", "replace"])
def test_the_old_file_stays_until_the_new_one_is_whole(dies_at, tmp_path, monkeypatch):
    file = tmp_path / "config.toml"
    file.write_text("old")
    (tmp_path / "link.toml").symlink_to(file)

    def die(*_):
        raise OSError("no space left on device")

    if dies_at != "write":
        monkeypatch.setattr(*((os, "fsync") if dies_at == "fsync" else (Path, "replace")), die)
    with pytest.raises(OSError, match="no space"), written_whole(file) as aside:
        aside.write_text("ne")
        assert file.read_text() == "old"
        if dies_at == "write":
            die()
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    with written_whole(tmp_path / "link.toml") as aside:
        aside.write_text("new")
    assert file.read_text() == "new" and (tmp_path / "link.toml").is_symlink()


def test_whether_it_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "new", "/dev/null"):
        check_writable(place, "x")
    for place in (tmp_path / "no" / "where", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match="--json x: can't be written: N"):
            check_writable(place, "--json x")
    with pytest.raises(UserError, match="--json x: can't be written: it is a folder"):
        check_writable(tmp_path, "--json x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_written_to():
    read, write = os.pipe()
    with written_whole(f"/dev/fd/{write}") as place:
        place.write_text("figures")
    assert os.read(read, 7) == b"figures" and Path("/dev/null").is_char_device()
