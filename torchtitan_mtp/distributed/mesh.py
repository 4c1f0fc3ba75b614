"""Process group and device mesh: which rank holds which shard and reads which data."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_mtp.config import Comm, Parallelism
from torchtitan_mtp.distributed.ranks import agree
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.context_parallel import ContextParallel, SequenceRanks
from torchtitan_mtp.models.expert_parallel import ExpertParallel

logger = logging.getLogger(__name__)

# What the driver of a GPU has in /dev, and the variables by which a user hides the GPUs.
GPU_NODES = {
    "/dev/nvidiactl": ("CUDA_VISIBLE_DEVICES",),
    "/dev/kfd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
# How long a cluster may take to make a host's name known that it starts together with the others.
NAME_SECONDS = 60
_LAUNCHER = " in the environment, which a launcher sets: start with torchrun, or unset it"


class Degrees(NamedTuple):
    """How many ranks each dimension of the mesh has, from the outermost to the innermost; and `ep`,
    of the ranks of dp_shard, cp and tp, how many share the experts of a layer."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """Their product, the number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp


@dataclass(frozen=True)
class World:
    """The ranks of this job.

    mesh: of the dimensions "pp", "dp_replicate", "fsdp" and "tp" those with more than one rank, and
    always "fsdp", over which parameters are sharded: dp_shard times cp.
    context_parallel: the ranks that read the same windows and have a part of each; None: every
    rank reads its own.
    tensor_parallel: the ranks that share the work on the same tokens; None: there are none.
    sequence: the ranks of both, between which a sequence is spread where every position is computed
    once; None: each has whole ones.
    batch: the ranks whose tokens together are a batch: all but those of pp and tp, which work on
    the same; None: all ranks. Targets are counted over them.
    losses: these on all stages of the pipeline, of which the last one has losses; None: all ranks.
    stage: the ranks that have the same layers: all but those of pp; None: all ranks.
    experts: of `expert_parallel`'s ranks and of the others that have tokens of their own, the mesh
    with dimensions "ep", and "efsdp", over which the experts of a rank are sharded ("dp_replicate"
    before them); None: experts are sharded like the rest.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    degrees: Degrees
    context_parallel: ContextParallel | None = None
    tensor_parallel: SequenceRanks | None = None
    sequence: SequenceRanks | None = None
    batch: dist.ProcessGroup | None = None
    losses: dist.ProcessGroup | None = None
    stage: dist.ProcessGroup | None = None
    experts: DeviceMesh | None = None
    expert_parallel: ExpertParallel | None = None

    @property
    def data_rank(self) -> int:
        """Which part of every global batch this rank reads, of `data_size`."""
        return self.rank // (self.degrees.cp * self.degrees.tp) % self.data_size

    @property
    def data_size(self) -> int:
        """Number of data ranks: dp_replicate * dp_shard."""
        return self.degrees.dp_replicate * self.degrees.dp_shard

    @property
    def batch_size(self) -> int:
        """Number of ranks in `batch`."""
        return self.data_size * self.degrees.cp

    def dimension(self, name: str) -> DeviceMesh | None:
        """A dimension of the mesh; None where it has one rank (but for "fsdp")."""
        return self.mesh[name] if name in (self.mesh.mesh_dim_names or ()) else None


def mesh_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """The degrees of the mesh, -1 resolved. Error: they do not multiply to the world size."""
    keys = {
        "pp": "pipeline_parallel_degree",
        "dp_replicate": "data_parallel_replicate_degree",
        "dp_shard": "data_parallel_shard_degree",
        "cp": "context_parallel_degree",
        "tp": "tensor_parallel_degree",
        "ep": "expert_parallel_degree",
    }
    degrees = Degrees(**{name: getattr(parallelism, key) for name, key in keys.items()})
    others = degrees._replace(dp_shard=1).ranks
    if degrees.dp_shard == -1 and others > 0 and world_size % others == 0:
        degrees = degrees._replace(dp_shard=world_size // others)
    if min(degrees) < 1 or degrees.ranks != world_size:
        given = {n: d for n, d in degrees._asdict().items() if n != "ep"}
        shown = [n for n, d in given.items() if n.startswith("dp") or d != 1]
        product = " times ".join(f"{keys[name]} = {given[name]}" for name in shown)
        advice = _advice(degrees, world_size)
        raise UserError(
            f"parallelism.{product} must be the number of ranks, {world_size}; set the shard "
            f"degree to -1 for what is left{advice}, or change the number of ranks"
        )
    sharing = degrees.dp_shard * degrees.cp * degrees.tp
    if sharing % degrees.ep:
        fit = [d for d in range(1, sharing + 1) if sharing % d == 0]
        nearest = min(fit, key=lambda d: abs(d - degrees.ep))
        raise UserError(
            f"parallelism.expert_parallel_degree = {degrees.ep}: expected a divisor of the ranks "
            f"of dp_shard, cp and tp, {sharing}; the nearest is {nearest}"
        )
    return degrees


def _advice(degrees: Degrees, world_size: int) -> str:
    """The nearest degree that fits, of the innermost dimension that is in the way, if any."""
    rest, words = (
        1,
        {"dp_replicate": "replicate", "pp": "pipeline", "tp": "tensor", "cp": "context"},
    )
    for name, word in words.items():
        degree = getattr(degrees, name)
        fit = [d for d in range(1, world_size + 1) if world_size % (rest * d) == 0]
        nearest = min(fit or [1], key=lambda d: abs(d - degree))
        if nearest != degree:
            return f" and the {word} degree to {nearest}"
        rest *= degree
    return ""


def launched() -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun sets them with others; (0, 1) without a launcher.

    Raises:
        UserError: some of its variables are absent, or are not what they have to be.
    """
    said = "RANK" in os.environ or os.environ.get("LOCAL_RANK")
    if not said and launch_number("WORLD_SIZE", 1, least=1) == 1:
        return 0, 1
    names = ["RANK", "WORLD_SIZE"] + ["MASTER_ADDR", "MASTER_PORT"] * (not dist.is_initialized())
    if absent := [name for name in names if not os.environ.get(name)]:
        there = ", ".join(n for n in (*names, "LOCAL_RANK") if os.environ.get(n))
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
        if not alone:
            resolve(os.environ["MASTER_ADDR"], min(comm.init_timeout_seconds, NAME_SECONDS))
        try:
            dist.init_process_group(backend, timeout=timeout, **_meeting_place(alone, timeout))
        except RuntimeError as error:
            place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(
                f"can't meet the other ranks at {place}: {str(error).splitlines()[0]}; check that "
                "all of them started and reach that address"
            ) from error
    agree(settings or {})
    return world_of(device, degrees)


def world_of(device: torch.device, degrees: Degrees) -> World:
    """The world of a process group that is there: its mesh and the groups within it.

    Ranks are dealt to pp, dp_replicate, dp_shard, cp and tp in this order, so that those of one
    sequence are neighbours.
    """
    pp, replicate, shard, cp, tp, _ = degrees
    sizes = {"pp": pp, "dp_replicate": replicate, "fsdp": shard * cp, "tp": tp}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "fsdp"}
    mesh = init_device_mesh(device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
    apart = mesh._unflatten("fsdp", (shard, cp), ("dp_shard", "cp")) if cp > 1 else mesh
    context = _group_of(apart, ["cp"] * (cp > 1))
    tensor = _group_of(apart, ["tp"] * (tp > 1))
    both = _group_of(apart, ["cp"] * (cp > 1) + ["tp"] * (tp > 1))
    experts = _experts_mesh(mesh, degrees) if degrees.ep > 1 else None
    return World(
        *(dist.get_rank(), dist.get_world_size(), device, mesh, degrees),
        context_parallel=ContextParallel(context) if context else None,
        tensor_parallel=SequenceRanks(tensor) if tensor else None,
        sequence=SequenceRanks(both) if both else None,
        batch=_group_without(mesh, "pp", "tp"),
        losses=_group_without(mesh, "tp"),
        stage=_group_without(mesh, "pp"),
        experts=experts,
        expert_parallel=ExpertParallel(experts["ep"].get_group()) if experts else None,
    )


def _experts_mesh(mesh: DeviceMesh, degrees: Degrees) -> DeviceMesh:
    """The mesh of experts' parameters: of ranks that see tokens of their own, those of "ep", which
    are neighbours, share the experts, and those of "efsdp" shard what is left."""
    left = degrees.dp_shard * degrees.cp * degrees.tp // degrees.ep
    sizes = {"pp": degrees.pp, "dp_replicate": degrees.dp_replicate}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    sizes |= {"efsdp": left, "ep": degrees.ep}
    whole = mesh._flatten("ranks")._unflatten(0, (*sizes.values(),), (*sizes,))
    return whole[(*(name for name in sizes if name != "pp"),)]


def _group_of(mesh: DeviceMesh, names: Sequence[str]) -> dist.ProcessGroup | None:
    """Ranks that differ in these dimensions; None for none."""
    if not names:
        return None
    part = mesh[(*names,)]
    return (part._flatten("_".join(names)) if len(names) > 1 else part).get_group()


def _group_without(mesh: DeviceMesh, *names: str) -> dist.ProcessGroup | None:
    """Ranks that differ in all dimensions but those named; None: all ranks."""
    all_names = mesh.mesh_dim_names or ()
    kept = [name for name in all_names if name not in names]
    return None if len(kept) == len(all_names) else _group_of(mesh, kept)


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


def resolve(host: str, seconds: float) -> None:
    """Wait until MASTER_ADDR, a host's name, leads to an address. A cluster may name a host some
    time after it started others, so it is only warned of at first. Error: it leads nowhere after so
    many seconds."""
    end, warned = time.monotonic() + seconds, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:  # the latter where it can't be a name at all
            told = f"MASTER_ADDR = {host!r} can't be resolved ({error})"
        if time.monotonic() >= end:
            raise UserError(f"{told}: set it to the name or address of the host of rank 0")
        if not warned:
            logger.warning("%s; trying again for %d seconds", told, seconds)
        warned = True
        time.sleep(1)


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
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Reduce over the ranks of a group, or all, in place, and return it; a single process has
    nothing to do."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def set_determinism(deterministic: bool, seed: int) -> None:
    """Seed this process, and with `deterministic` refuse operations that vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
