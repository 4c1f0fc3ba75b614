"""Degrees of data parallelism."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mtp.config import Parallelism
from torchtitan_mtp.distributed import mesh
from torchtitan_mtp.distributed.mesh import GPU_NODES, data_degrees, local_device
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.load import find_device


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (1, -1, 1, (1, 1)),
        (1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (8, -1, 8, (8, 1)),
        (4, 2, 8, (4, 2)),
    ],
)
def test_degrees(replicate, shard, world, expected):
    parallelism = Parallelism(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
    )
    assert data_degrees(parallelism, world) == expected


@pytest.mark.parametrize(
    ("replicate", "shard", "world"), [(3, -1, 8), (1, 4, 8), (2, 8, 8), (0, -1, 8), (-1, -1, 8)]
)
def test_degrees_that_do_not_make_the_world(replicate, shard, world):
    parallelism = Parallelism(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
    )
    with pytest.raises(UserError, match=rf"replicate_degree = {replicate} .*number of ranks, 8"):
        data_degrees(parallelism, world)


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
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)
