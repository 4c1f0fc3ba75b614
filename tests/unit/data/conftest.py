import os

import pytest
from loader_sources import jsonl


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where the contents of compressed files go."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder / f"torchtitan_mtp-{os.getuid()}"


@pytest.fixture
def source(tmp_path):
    return jsonl(tmp_path)
