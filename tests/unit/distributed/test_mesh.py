"""Degrees of data parallelism."""

from __future__ import annotations

import itertools
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan_mtp.config import Comm, Parallelism
from torchtitan_mtp.distributed import mesh
from torchtitan_mtp.distributed.mesh import (
    GPU_NODES,
    Degrees,
    init_world,
    launched,
    local_device,
    mesh_degrees,
    record_collectives,
)
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.load import find_device

KEYS = {
    "pp": "pipeline_parallel_degree",
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
}


def parallelism(**degrees) -> Parallelism:
    return Parallelism(**{KEYS[name]: degree for name, degree in degrees.items()})


@pytest.mark.parametrize(
    ("degrees", "world", "expected"),
    [
        ({}, 1, Degrees()),
        ({}, 8, Degrees(dp_shard=8)),
        ({"replicate": 2}, 8, Degrees(dp_replicate=2, dp_shard=4)),
        ({"replicate": 8}, 8, Degrees(dp_replicate=8)),
        ({"replicate": 4, "shard": 2}, 8, Degrees(dp_replicate=4, dp_shard=2)),
        ({"cp": 4}, 8, Degrees(dp_shard=2, cp=4)),
        ({"replicate": 2, "cp": 2}, 8, Degrees(dp_replicate=2, dp_shard=2, cp=2)),
        ({"shard": 1, "cp": 8}, 8, Degrees(cp=8)),
        ({"tp": 2, "pp": 2}, 8, Degrees(pp=2, dp_shard=2, tp=2)),
        ({"ep": 8, "cp": 2}, 8, Degrees(dp_shard=4, cp=2, ep=8)),
    ],
)
def test_degrees(degrees, world, expected):
    assert mesh_degrees(parallelism(**degrees), world) == expected


@pytest.mark.parametrize(
    ("degrees", "advice"),
    [
        ({"replicate": 3, "shard": -1}, " and the replicate degree to 2"),
        ({"replicate": 1, "shard": 4}, ""),
        ({"replicate": 2, "shard": 8}, ""),
        ({"replicate": 0, "shard": -1}, " and the replicate degree to 1"),
        ({"replicate": -1, "shard": -1}, " and the replicate degree to 1"),
        ({"replicate": 1, "shard": -1, "cp": 3}, " and the context degree to 2"),
        ({"replicate": 2, "shard": -1, "cp": 8}, " and the context degree to 4"),
        ({"replicate": 1, "shard": 8, "cp": 0}, " and the context degree to 1"),
        ({"replicate": 2, "shard": -1, "tp": 8}, " and the tensor degree to 4"),
        ({"pp": 3, "replicate": 1, "shard": -1, "tp": 2}, " and the pipeline degree to 2"),
        ({"replicate": 1, "shard": -1, "cp": 8, "tp": 2}, " and the context degree to 4"),
    ],
)
def test_degrees_that_do_not_make_the_world(degrees, advice):
    with pytest.raises(UserError) as caught:
        mesh_degrees(parallelism(**degrees), 8)
    product = " times ".join(f"{KEYS[name]} = {degree}" for name, degree in degrees.items())
    assert str(caught.value) == (
        f"parallelism.{product} must be the number of ranks, 8; set the shard degree to -1 for "
        f"what is left{advice}, or change the number of ranks"
    )


def test_experts_that_the_ranks_cannot_share():
    with pytest.raises(UserError) as caught:
        mesh_degrees(parallelism(replicate=2, ep=3), 8)
    assert str(caught.value) == (
        "parallelism.expert_parallel_degree = 3: expected a divisor of the ranks of dp_shard, cp "
        "and tp, 4; the nearest is 2"
    )


@pytest.fixture
def rank_of():
    """From a rank and degrees to its world; the other ranks are torch's fake group."""

    def make(rank: int, degrees: Degrees) -> mesh.World:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=degrees.ranks, store=FakeStore())
        return mesh.world_of(torch.device("cpu"), degrees)

    yield make
    dist.destroy_process_group()


def members(group) -> list[int]:
    return dist.get_process_group_ranks(group)


def test_who_reads_what(rank_of):
    """Ranks of one sequence are neighbours and read the same windows, and so do all stages."""
    worlds = [rank_of(r, Degrees(dp_shard=8)) for r in range(8)]
    assert [world.data_rank for world in worlds] == [*range(8)]
    assert (worlds[0].batch, worlds[0].losses) == (None, None)
    worlds = [rank_of(r, Degrees(dp_replicate=2, dp_shard=2, cp=2)) for r in range(8)]
    assert [world.data_rank for world in worlds] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {world.data_size for world in worlds} == {4}
    degrees = Degrees(pp=2, dp_shard=2, cp=2, tp=2)
    assert [rank_of(r, degrees).data_rank for r in range(16)] == 2 * [0, 0, 0, 0, 1, 1, 1, 1]


def test_groups(rank_of):
    """Rank 13 of 32: the second of tp, the first of cp and pp, the second of the others."""
    world = rank_of(13, Degrees(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2))
    assert members(world.batch) == [*range(1, 16, 2)]
    assert members(world.losses) == [*range(1, 32, 2)]
    assert members(world.mesh["fsdp"].get_group()) == [9, 11, 13, 15]
    assert members(_resolve_process_group(world.context_parallel.name)) == [13, 15]
    places = [world.dimension(name).get_local_rank() for name in ("pp", "dp_replicate", "tp")]
    assert places == [0, 1, 1]
    assert (world.data_rank, world.data_size, world.batch_size) == (3, 4, 8)
    assert members(world.stage) == [*range(16)] and world.experts is None
    world = rank_of(3, Degrees(dp_shard=4))
    assert world.mesh.mesh_dim_names == ("fsdp",) and world.dimension("tp") is None


def test_who_shares_experts(rank_of):
    """Neighbours, tp's ranks among them; those with the same experts are apart by so many."""
    world = rank_of(29, Degrees(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4))
    assert world.experts.mesh_dim_names == ("dp_replicate", "efsdp", "ep")
    groups = {n: members(world.experts[n].get_group()) for n in world.experts.mesh_dim_names}
    assert groups == {"dp_replicate": [21, 29], "efsdp": [25, 29], "ep": [28, 29, 30, 31]}
    assert (world.expert_parallel.rank, world.expert_parallel.size) == (1, 4)
    world = rank_of(1, Degrees(cp=2, ep=2))
    assert (world.experts["efsdp"].size(), members(world.experts["ep"].get_group())) == (1, [0, 1])


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
        (dict.fromkeys(MEET) | {"LOCAL_RANK": "0"}, f"LOCAL_RANK without {', '.join(MEET)}"),
        ({"RANK": "zero"}, "RANK = 'zero', expected 0 to 1"),
        ({"RANK": "2"}, "RANK = '2', expected 0 to 1"),
        ({"RANK": "-1"}, "RANK = '-1', expected 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0', expected 1 to"),
        ({"WORLD_SIZE": "1e30"}, "WORLD_SIZE = '1e30', expected 1 to"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http', expected 0 to 65535"),
    ],
)
def test_variables_of_a_launcher_that_cannot_be(changes, found, monkeypatch):
    for name, value in (MEET | {"LOCAL_RANK": None} | changes).items():
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


@pytest.fixture
def known_from(monkeypatch):
    """Sets from which time on, in seconds, a name is known; the clock is made up."""
    seconds = itertools.count()

    def set_time(begin: int) -> None:
        def look_up(host: str, port: None) -> None:
            if next(seconds) < begin:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(mesh.socket, "getaddrinfo", look_up)

    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda s: None)
    monkeypatch.setattr(mesh, "time", clock)
    return set_time


def test_the_name_of_a_host_may_come_late(known_from, caplog):
    known_from(40)
    mesh.resolve("head-0", 60)
    (warning,) = caplog.messages
    assert warning.startswith("MASTER_ADDR = 'head-0' can't be resolved ([Errno -2] Name or serv")
    assert warning.endswith("; trying again for 60 seconds")


def test_a_name_that_leads_nowhere(known_from, monkeypatch):
    known_from(200)
    for name, value in (MEET | {"MASTER_ADDR": "head-0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^MASTER_ADDR = 'head-0' can't be resolved .*: set it to"):
        init_world(Parallelism())


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
    record_collectives(Comm(trace_buf_size=9), str(tmp_path / "elsewhere"))
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7", "the user's own stays"
