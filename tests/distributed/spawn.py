"""Run a function on several gloo ranks, each a process of its own, from inside a test.

Ranks are forks of a server (of `multiprocessing`) that has the package and its libraries imported
and has done nothing else: importing them takes seconds of each rank otherwise.
"""

import faulthandler
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[2]
MODULES = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torchao.float8",
    "tyro",
    "torchtitan_mtp.trainer",
]


def fork_server() -> ForkServerContext:
    """Makes processes that have `MODULES` imported; one server for all tests of a process."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # the server lacks pytest's paths
        forkserver.ensure_running()
    return context


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120
) -> list[Any]:
    """Call `fn(rank, *args)` on every rank of a new gloo group and return what the ranks returned.

    fn must be importable (the top level of a test file), args and results picklable; tensors come
    back as copies. Each rank has one thread, and torchrun's variables in its environment.

    Raises RuntimeError with the traceback of the rank that failed first, and TimeoutError when the
    ranks take longer than `timeout` seconds. No process outlives the call.
    """
    deadline = time.monotonic() + timeout
    # The store lives here, as torchrun's does, so the port is taken from the start and no other
    # process can have it before rank 0 does.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # join the store of the parent, start none
        "CUDA_VISIBLE_DEVICES": "",  # gloo's ranks compute on the CPU, however many GPUs there are
    }
    context = fork_server()
    stderr = Connection(os.dup(2))  # of now; the server has that of its start
    processes, connections = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, environment, timeout, sender, stderr, fn, args),
                daemon=True,
            )
            process.start()
            sender.close()  # the rank holds the other copy: its death then reads as end of file
            processes.append(process)
            connections.append(receiver)
        return _collect(connections, processes, deadline)
    finally:
        stderr.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(connections: list[Connection], processes: list[Any], deadline: float) -> list[Any]:
    """Wait for one message from every rank; raise what failed first."""
    results: dict[int, Any] = {}
    failures: list[tuple[float, str]] = []
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        # After a failure, those that it came from may be on their way still.
        patience = 2.0 if failures else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), timeout=patience)
        if not ready and not failures:
            raise TimeoutError(f"no answer in time from ranks {sorted(waiting.values())}")
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                when, error, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                code = processes[rank].exitcode
                # Others' deaths make a rank fail; nothing but its own makes it die without a word.
                failures.append((0.0, f"rank {rank} died with exit code {code}"))
                continue
            if error:
                failures.append((when, f"rank {rank} failed:\n{error}"))
            results[rank] = result
    if failures:  # a rank that fails takes others with it: the first is the one to show
        raise RuntimeError(min(failures)[1])
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    rank: int,
    environment: dict[str, str],
    timeout: float,
    sender: Connection,
    stderr: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.dup2(stderr.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    faulthandler.enable()  # a rank that crashes in C says where its threads were, on stderr
    torch.set_num_threads(1)
    error, result = None, None
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        result = fn(rank, *args)
        # Plain pickle copies tensors; multiprocessing's would share memory that dies with the rank.
        message = pickle.dumps((time.monotonic(), None, result))
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
        message = pickle.dumps((time.monotonic(), error, None))
    sender.send_bytes(message)
    sender.close()
    os._exit(1 if error else 0)  # a broken group can hang in its destructors
