"""Files are whole or absent, at whatever moment their writer dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchtitan_mtp.writing import written_whole


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


def test_what_is_no_file_is_written_to():
    read, write = os.pipe()
    with written_whole(f"/dev/fd/{write}") as place:
        place.write_text("figures")
    assert os.read(read, 7) == b"figures" and Path("/dev/null").is_char_device()
