"""Checkpoints at a URL, with fsspec's memory and local file systems."""

import logging
import pickle

import fsspec
import pytest
from checkpoint_run import Run, TinyModel, equal, snapshot

from torchtitan_mtp.checkpoint import find_checkpoint, find_config, load_model_weights
from torchtitan_mtp.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path) -> str:
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        return "memory://bucket/run"
    return f"file://{tmp_path}/bucket/run"


def make(tmp_path, url, **config) -> Run:
    """`Run` has the dump folder as its first argument, and the checkpoints go elsewhere."""
    run = Run(tmp_path / "dump", **config)
    settings = run.checkpointer.config
    settings.folder = f"{url}/checkpoint"
    checkpointer = type(run.checkpointer)(
        settings, tmp_path / "dump", run.model, run.optimizer, run.checkpointer.extra
    )
    run.checkpointer = checkpointer
    return run


def names(url) -> list[str]:
    fs, path = fsspec.core.url_to_fs(f"{url}/checkpoint")
    return sorted(entry.rpartition("/")[2] for entry in fs.ls(path, detail=False))


def open_file(url, name, mode):
    return fsspec.open(f"{url}/checkpoint/{name}", mode).open()


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_resume(tmp_path, url, async_mode):
    run = make(tmp_path, url, async_mode=async_mode)
    for step in (2, 4):
        run.train(2)
        assert run.checkpointer.save(step)
    run.checkpointer.close()
    resumed = make(tmp_path, url, seed=1)
    assert resumed.checkpointer.load() == 4
    assert equal(snapshot(resumed), snapshot(run))
    assert resumed.train(2, seed=3) == run.train(2, seed=3)
    assert not (tmp_path / "dump").exists()
    assert not list(tmp_path.glob("*:*"))  # no folder with a URL's name


def test_initial_load_and_weights(tmp_path, url):
    run = make(tmp_path, url)
    run.train(2)
    run.checkpointer.save(2)
    started = Run(tmp_path / "other", seed=1, initial_load_path=url)
    started.checkpointer.load()
    assert equal(dict(started.model.state_dict()), dict(run.model.state_dict()))
    model = TinyModel(seed=2)
    load_model_weights(f"{url}/checkpoint/step-2", model)
    assert equal(dict(model.state_dict()), dict(run.model.state_dict()))


def test_retention(tmp_path, url):
    run = make(tmp_path, url, keep_latest_k=2)
    for step in (2, 4, 6):
        run.checkpointer.save(step)
    assert names(url) == ["step-4", "step-6"]


def test_an_interrupted_save_is_ignored_then_replaced(tmp_path, url, caplog):
    caplog.set_level(logging.INFO)
    run = make(tmp_path, url)
    run.train(2)
    run.checkpointer.save(2)
    with open_file(url, "step-4/__0_0.distcp", "wb") as stream:
        stream.write(b"half")
    resumed = make(tmp_path, url, seed=1)
    assert resumed.checkpointer.load() == 2
    assert "step-4: neither .metadata nor manifest: not finished, ignored" in caplog.text
    resumed.train(2)
    assert resumed.checkpointer.save(4)
    assert make(tmp_path, url).checkpointer.load() == 4


def test_damage_is_named(tmp_path, url):
    run = make(tmp_path, url)
    run.train(2)
    run.checkpointer.save(2)
    with open_file(url, "step-2/__0_0.distcp", "rb") as stream:
        content = bytearray(stream.read())
    content[len(content) // 2] ^= 1
    with open_file(url, "step-2/__0_0.distcp", "wb") as stream:
        stream.write(content)
    with pytest.raises(UserError, match=r"step-2/__0_0.distcp: bytes .*: damaged") as error:
        make(tmp_path, url).checkpointer.load()
    assert str(error.value).startswith(url.split("://")[0])
    with open_file(url, "step-2/__0_0.distcp", "wb") as stream:
        stream.write(content[:10])
    with pytest.raises(UserError, match=r"__0_0.distcp: 10 bytes, expected \d+: damaged"):
        make(tmp_path, url).checkpointer.load()


def test_a_full_save_in_the_place_of_a_model_only_one(tmp_path, url):
    run = make(tmp_path, url)
    run.checkpointer.save(2, last=True)
    assert run.checkpointer.save(2)
    assert names(url) == ["step-2", "step-2.model_only"]
    assert make(tmp_path, url).checkpointer.load() == 2


def test_a_failed_save_leaves_nothing(tmp_path, url, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    def fail(*_):
        raise OSError(28, "No space left on device")

    run = make(tmp_path, url)
    run.checkpointer.save(2)
    monkeypatch.setattr(FileSystemWriter, "write_data", fail)
    with pytest.raises(UserError, match=r"step-4: can't be saved: OSError: .*No space left"):
        run.checkpointer.save(4)
    assert names(url) == ["step-2"]


def test_the_configuration_beside_it(tmp_path, url):
    make(tmp_path, url).checkpointer.save(2)
    assert str(find_checkpoint(url)) == f"{url}/checkpoint/step-2"
    with pytest.raises(UserError, match=r"no config.toml"):
        find_config(url)
    with fsspec.open(f"{url}/config.toml", "w") as stream:
        stream.write("[job]\n")
    assert find_config(url).read_text() == "[job]\n"


def test_what_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"nosuch://x: can't be reached through fsspec"):
        find_checkpoint("nosuch://x")
    with pytest.raises(UserError, match=r"last_save_in_hf = true: needs a local folder"):
        make(tmp_path, "memory://x", last_save_in_hf=True)


def test_malicious_metadata_does_not_run(tmp_path, url):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (canary.write_text, ("ran",))

    with open_file(url, "step-1/.metadata", "wb") as stream:
        stream.write(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"not the metadata of a DCP checkpoint"):
        load_model_weights(f"{url}/checkpoint", TinyModel())
    assert not canary.exists()
