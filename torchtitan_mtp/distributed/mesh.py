"""Process group and device mesh: which rank holds which shard and reads which data."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_mtp.config import Comm, Parallelism
from torchtitan_mtp.distributed.ranks import agree
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.context_parallel import ContextParallel

# What the driver of a GPU has in /dev, and the variables by which a user hides the GPUs.
GPU_NODES = {
    "/dev/nvidiactl": ("CUDA_VISIBLE_DEVICES",),
    "/dev/kfd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
_LAUNCHER = " in the environment, which a launcher sets: start with torchrun, or unset it"


class Degrees(NamedTuple):
    """How many ranks each dimension of the mesh has, from the outermost to the innermost."""

    dp_replicate: int
    dp_shard: int
    cp: int


@dataclass(frozen=True)
class World:
    """The ranks of this job.

    mesh: ("dp_replicate", "dp_shard"), over which parameters are replicated and sharded; the second
    has the ranks of cp in it.
    context_parallel: the ranks that read the same windows and have a part of each; None: every
    rank reads its own. Targets, losses and loads of experts are summed over all ranks.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    context_parallel: ContextParallel | None = None

    @property
    def data_rank(self) -> int:
        """Which part of every global batch this rank reads, of `data_size`."""
        cp = self.context_parallel
        return self.rank // cp.size if cp else self.rank

    @property
    def data_size(self) -> int:
        """Number of data ranks: dp_replicate * dp_shard."""
        cp = self.context_parallel
        return self.size // cp.size if cp else self.size


def mesh_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """The degrees of the mesh, -1 resolved. Error: they do not multiply to the world size."""
    replicate = parallelism.data_parallel_replicate_degree
    shard = parallelism.data_parallel_shard_degree
    cp = parallelism.context_parallel_degree
    if shard == -1 and replicate * cp > 0 and world_size % (replicate * cp) == 0:
        shard = world_size // (replicate * cp)
    degrees = Degrees(replicate, shard, cp)
    if min(degrees) < 1 or math.prod(degrees) != world_size:
        fit = [d for d in range(1, world_size + 1) if world_size % (max(replicate, 1) * d) == 0]
        nearest = min(fit or [1], key=lambda d: abs(d - cp))
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {replicate} times "
            f"data_parallel_shard_degree = {shard} times context_parallel_degree = {cp} must be "
            f"the number of ranks, {world_size}; set the shard degree to -1 for what is left"
            + (f" and the context degree to {nearest}" if nearest != cp else "")
            + ", or change the number of ranks"
        )
    return degrees


def launched() -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun sets them with others; (0, 1) without a launcher.

    Raises:
        UserError: some of its variables are absent, or are not what they have to be.
    """
    if "RANK" not in os.environ and launch_number("WORLD_SIZE", 1, least=1) == 1:
        return 0, 1
    names = ["RANK", "WORLD_SIZE"] + ["MASTER_ADDR", "MASTER_PORT"] * (not dist.is_initialized())
    if absent := [name for name in names if not os.environ.get(name)]:
        there = ", ".join(name for name in names if name not in absent)
        raise UserError(f"{there} without {', '.join(absent)}{_LAUNCHER}")
    size = launch_number("WORLD_SIZE", 1, least=1)
    launch_number("MASTER_PORT", 0, most=65535)
    return launch_number("RANK", 0, most=size - 1), size


def launch_number(name: str, otherwise: int, least: int = 0, most: int = 2**31 - 1) -> int:
    """A launcher's variable, or `otherwise` where it is not set. Error: no number of that range."""
    text = os.environ.get(name, str(otherwise))
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UserError(f"{name} = {text!r}, expected {least} to {most}{_LAUNCHER}")
    return int(text)


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none, or where it is hidden on purpose.

    Errors: there is one that torch can't use, or fewer than processes.
    """
    try:
        torch.cuda.init()
        index, count = launch_number("LOCAL_RANK", 0), torch.cuda.device_count()
        if index >= count:
            raise UserError(
                f"LOCAL_RANK = {index}: torch sees {count} GPUs here, expected one for every "
                f"process of this machine; start {count} (NGPU, or torchrun's --nproc_per_node)"
            )
        return torch.device("cuda", index)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or "CUDA does not start").splitlines()[0].removesuffix(".")
    for node, variables in GPU_NODES.items():
        hidden = any(os.environ.get(name) in ("", "-1") for name in variables)
        if os.path.exists(node) and not hidden:
            raise UserError(
                f"there is a GPU ({node}) that torch {torch.__version__} can't use: {reason}; take "
                f'a torch that fits its driver, or set {variables[0]}="" to compute on the CPU'
            )
    return torch.device("cpu")


def init_world(
    parallelism: Parallelism,
    comm: Comm | None = None,
    settings: Mapping[str, Any] | None = None,
    dump_folder: str = ".",
) -> World:
    """Join the job that torchrun started, or start one of a single rank.

    settings: what all ranks have to `agree` on, at once.
    """
    comm = comm or Comm()
    alone = "RANK" not in os.environ
    device = local_device()
    if device.type == "cuda":
        record_collectives(comm, dump_folder)
        torch.cuda.set_device(device)
    degrees = mesh_degrees(parallelism, launched()[1])
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=comm.init_timeout_seconds)
        try:
            dist.init_process_group(backend, timeout=timeout, **_meeting_place(alone, timeout))
        except RuntimeError as error:
            place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(
                f"can't meet the other ranks at {place}: {str(error).splitlines()[0]}; check that "
                "all of them started and reach that address"
            ) from error
    agree(settings or {})
    return World(dist.get_rank(), dist.get_world_size(), device, *_views(device, degrees))


def _views(device: torch.device, degrees: Degrees) -> tuple[DeviceMesh, ContextParallel | None]:
    """The mesh as FSDP2 has it, and the ranks that this one shares its sequences with. Ranks are
    dealt to dp_replicate, dp_shard and cp in this order: those of one sequence are neighbours."""
    replicate, shard, cp = degrees
    sizes, names = (replicate, shard * cp), ("dp_replicate", "dp_shard")
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    if cp == 1:
        return mesh, None
    by_data = init_device_mesh(device.type, (replicate * shard, cp), mesh_dim_names=("dp", "cp"))
    return mesh, ContextParallel(by_data.get_group("cp"))


def record_collectives(comm: Comm, dump_folder: str) -> None:
    """NCCL's flight recorder: what every rank was doing when a collective timed out."""
    folder = os.path.join(dump_folder, comm.save_traces_folder)
    if comm.trace_buf_size:
        with contextlib.suppress(OSError):  # then there are no traces
            os.makedirs(folder, exist_ok=True)
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
    traces = os.path.join(folder, comm.save_traces_file_prefix)
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", traces)


def _meeting_place(alone: bool, timeout: timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` that say where the ranks meet."""
    if alone:  # one process needs no port to meet others at
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    # torchrun keeps one store over restarts (pytorch#135712), with the addresses of the dead.
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    return {"store": dist.PrefixStore(f"life {life}", store), "rank": rank, "world_size": size}


def set_timeout(seconds: int) -> None:
    """Seconds after which a collective that waits for a rank ends the job."""
    dist.barrier()  # nobody may still be in a collective that needs the longer time
    timeout = timedelta(seconds=seconds)
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def all_reduce(
    tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Reduce over all ranks in place, and return it; a single process has nothing to do."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor


def set_determinism(deterministic: bool, seed: int) -> None:
    """Seed this process, and with `deterministic` refuse operations that vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
