"""Checksums of pieces, against zlib over the whole; what is read is what was written."""

import io
import random
import zlib

import pytest
import torch
from checkpoint_run import Run, equal, snapshot

from torchtitan_mtp.checkpoint import checksums
from torchtitan_mtp.checkpoint.checksums import FileEntry, SummedStream, check_piece, pieces_of
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*", "ignore:torch.distributed is")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(checksums, "PIECE", 100)


def naive(content: bytes) -> FileEntry:
    starts = range(0, len(content), 100)
    crcs = "".join(f"{zlib.crc32(content[i : i + 100]):08x}" for i in starts)
    return FileEntry(len(content), crcs)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 1000])
def test_any_way_of_writing_gives_the_same_entry(size):
    content = random.Random(size).randbytes(size)
    for step in (1, 7, 100, 1000):
        summed = SummedStream(io.BytesIO())
        for start in range(0, size, step):
            summed.write(memoryview(content)[start : start + step])
        assert (summed.entry(), summed.getvalue()) == (naive(content), content)


@pytest.mark.parametrize("flipped", [None, 0, 99, 100, 555, 949])
def test_only_what_is_read_has_to_be_right(flipped, tmp_path):
    content = bytearray(random.Random(1).randbytes(950))
    entry = naive(bytes(content))
    if flipped is not None:
        content[flipped] ^= 1
    file = tmp_path / "file"
    file.write_bytes(content)
    for start, length in ((0, 30), (30, 200), (500, 0), (600, 350)):
        first, last = start // 100, (start + max(length, 1) - 1) // 100
        assert list(pieces_of(start, length)) == list(range(first, last + 1))
        for number in pieces_of(start, length):
            if flipped is not None and number == flipped // 100:
                place = f"file: bytes {flipped // 100 * 100} to .* have the checksum .*: damaged"
                with pytest.raises(UserError, match=place):
                    check_piece(file, entry, number)
            else:
                check_piece(file, entry, number)


def test_a_file_that_ends_early(tmp_path):
    (tmp_path / "file").write_bytes(bytes(220))
    with pytest.raises(UserError, match="file: ends before byte 250: damaged"):
        check_piece(tmp_path / "file", naive(bytes(250)), 2)


def test_the_writer_sums_up_every_file(tmp_path):
    import torch.distributed.checkpoint as dcp

    writer = SummingWriter(tmp_path / "step")
    states = {"a": torch.randn(40, 40), "b": {"plain": [1, 2]}, "c": torch.randn(3)}
    dcp.save(states, storage_writer=writer, no_dist=True)
    files = list((tmp_path / "step").iterdir())
    assert {file.name for file in files} == {".metadata", "__0_0.distcp"}
    assert writer.entries == {file.name: naive(file.read_bytes()) for file in files}
    assert torch.serialization.get_crc32_options() is True  # others' files keep theirs


def test_verification_can_be_turned_off(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    file = tmp_path / "checkpoint" / "step-2" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    start = content.index(run.model.norm.weight.detach().numpy().tobytes())
    content[start] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"__0_0.distcp: bytes .* have the checksum"):
        Run(tmp_path).checkpointer.load()
    loose = Run(tmp_path, seed=1, verify=False)
    assert loose.checkpointer.load() == 2
    assert not equal(snapshot(loose), snapshot(run))
    assert equal(loose.optimizer.state_dict(), run.optimizer.state_dict())
