"""Degrees of data parallelism."""

from __future__ import annotations

import os

import pytest
import torch

from torchtitan_mtp.config import Comm, Parallelism
from torchtitan_mtp.distributed import mesh
from torchtitan_mtp.distributed.mesh import (
    GPU_NODES,
    launched,
    local_device,
    mesh_degrees,
    record_collectives,
)
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.load import find_device


@pytest.mark.parametrize(
    ("degrees", "world", "expected"),
    [
        ((1, -1, 1), 1, (1, 1, 1)),
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((8, -1, 1), 8, (8, 1, 1)),
        ((4, 2, 1), 8, (4, 2, 1)),
        ((1, -1, 4), 8, (1, 2, 4)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 1, 8), 8, (1, 1, 8)),
    ],
)
def test_degrees(degrees, world, expected):
    assert mesh_degrees(Parallelism(*degrees), world) == expected


@pytest.mark.parametrize(
    ("degrees", "advice"),
    [
        ((3, -1, 1), ""),
        ((1, 4, 1), ""),
        ((2, 8, 1), ""),
        ((0, -1, 1), ""),
        ((-1, -1, 1), ""),
        ((1, -1, 3), " and the context degree to 2"),
        ((2, -1, 8), " and the context degree to 4"),
        ((1, 8, 0), " and the context degree to 1"),
    ],
)
def test_degrees_that_do_not_make_the_world(degrees, advice):
    replicate, shard, cp = degrees
    with pytest.raises(UserError) as caught:
        mesh_degrees(Parallelism(*degrees), 8)
    assert str(caught.value) == (
        f"parallelism.data_parallel_replicate_degree = {replicate} times "
        f"data_parallel_shard_degree = {shard} times context_parallel_degree = {cp} must be the "
        f"number of ranks, 8; set the shard degree to -1 for what is left{advice}, or change the "
        "number of ranks"
    )


def test_who_reads_what():
    """Ranks of one sequence are neighbours and read the same windows."""
    alone = mesh.World(5, 8, torch.device("cpu"), None)
    assert (alone.data_rank, alone.data_size) == (5, 8)

    class Two:
        size = 2

    shared = [mesh.World(r, 8, torch.device("cpu"), None, Two()) for r in range(8)]
    assert [world.data_rank for world in shared] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {world.data_size for world in shared} == {4}


def cannot(reason):
    """In place of `torch.cuda.init`, with what it raises."""

    def init():
        raise reason

    return init


TOO_OLD = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore")
NO_CUDA = AssertionError("Torch not compiled with CUDA enabled")


@pytest.mark.parametrize("choose", [local_device, lambda: find_device(None)])
@pytest.mark.parametrize(("there", "variable"), [(0, "CUDA"), (1, "HIP")])
@pytest.mark.parametrize("reason", [TOO_OLD, NO_CUDA])
def test_a_gpu_that_cannot_be_used(choose, there, variable, reason, tmp_path, monkeypatch):
    """It stops with torch's reason, unless the user hides the GPU; with no GPU it is the CPU's."""
    assert list(GPU_NODES) == ["/dev/nvidiactl", "/dev/kfd"]
    nodes = [tmp_path / "nvidiactl", tmp_path / "kfd"]
    variables = GPU_NODES.values()
    names = dict(zip(map(str, nodes), variables, strict=True))
    monkeypatch.setattr(mesh, "GPU_NODES", names)
    monkeypatch.setattr(torch.cuda, "init", cannot(reason))
    for name in {name for several in variables for name in several}:
        monkeypatch.delenv(name, raising=False)
    assert choose() == torch.device("cpu")
    nodes[there].touch()
    text = str(reason).splitlines()[0].removesuffix(".")
    for value in (None, "0", "0,1"):
        if value:
            monkeypatch.setenv(f"{variable}_VISIBLE_DEVICES", value)
        with pytest.raises(UserError) as caught:
            choose()
        message = str(caught.value)
        assert f"({nodes[there]})" in message and f"can't use: {text}; " in message
        assert f'{variable}_VISIBLE_DEVICES=""' in message
    for value in ("", "-1"):
        monkeypatch.setenv(f"{variable}_VISIBLE_DEVICES", value)
        assert choose() == torch.device("cpu")
    monkeypatch.delenv(f"{variable}_VISIBLE_DEVICES")
    assert find_device("cpu") == torch.device("cpu")


def test_a_gpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match=r"^LOCAL_RANK = 4: torch sees 4 GPUs here, .* start 4 "):
        local_device()


MEET = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"WORLD_SIZE": None}, "RANK, MASTER_ADDR, MASTER_PORT without WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT without RANK"),
        ({"MASTER_PORT": None}, "RANK, WORLD_SIZE, MASTER_ADDR without MASTER_PORT"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "WORLD_SIZE without MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "zero"}, "RANK = 'zero', expected 0 to 1"),
        ({"RANK": "2"}, "RANK = '2', expected 0 to 1"),
        ({"RANK": "-1"}, "RANK = '-1', expected 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0', expected 1 to"),
        ({"WORLD_SIZE": "1e30"}, "WORLD_SIZE = '1e30', expected 1 to"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http', expected 0 to 65535"),
    ],
)
def test_variables_of_a_launcher_that_cannot_be(changes, found, monkeypatch):
    for name, value in (MEET | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{found}.* in the environment, .*: start with torchrun"):
        launched()


def test_variables_of_a_launcher(monkeypatch):
    for name in MEET:
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    for name, value in (MEET | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert launched() == (1, 2)


def test_traces_of_collectives_go_where_the_configuration_says(tmp_path, monkeypatch):
    """The names are those that torch's libraries read."""
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    comm = Comm(trace_buf_size=7, save_traces_folder="traces", save_traces_file_prefix="r")
    record_collectives(comm, str(tmp_path))
    assert [os.environ[name] for name in names] == ["7", str(tmp_path / "traces" / "r"), "1"]
    assert (tmp_path / "traces").is_dir()
    record_collectives(Comm(trace_buf_size=9), "elsewhere")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7", "the user's own stays"
