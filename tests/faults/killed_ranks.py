"""Kill one or both of the ranks at random moments of a save; check what is left.

Run as `python killed_ranks.py FOLDER COUNT`: COUNT kills each of one and two ranks, saving in the
foreground and in the background; prints how many kills found the save unfinished and how many
found it done. Whatever the moment, the run resumes at the killed save or at the one before it,
equal to what was saved, and the next save works.
"""

import copy
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "checkpoint"))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from checkpoint_run import Run, TinyModel, equal, snapshot
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def join(folder: Path, rank: int, ranks: int, life: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        store = dist.FileStore(str(folder / f"store-{life}"), ranks)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
        )


def make_run(folder: Path, ranks: int, mode: str, seed: int = 0) -> Run:
    model = TinyModel(seed=seed)
    if ranks > 1:
        for block in (*model.layers.values(), *model.mtp.heads.values()):
            fully_shard(block)
        fully_shard(model)
    return Run(folder, model=model, async_mode=mode, keep_latest_k=2)


def local(state):
    """A nested state with this rank's shards in the place of DTensors."""
    if isinstance(state, DTensor):
        return state.to_local().clone()
    if isinstance(state, dict):
        return {key: local(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(local(value) for value in state)
    return copy.deepcopy(state)


def run_to(folder: Path, step: int, ranks: int, mode: str) -> Run:
    run = make_run(folder, ranks, mode)
    run.train(step, seed=0)
    return run


def save(folder: Path, rank: int, ranks: int, mode: str, begun: int) -> None:
    """Steps 2 and 4 are there; save step 6, and tell the parent when it begins and is done."""
    join(folder, rank, ranks, "save")
    run = run_to(folder, 6, ranks, mode)
    os.write(begun, b"b")
    run.checkpointer.save(6)
    run.checkpointer.close()
    os.write(begun, b"d")


def check(folder: Path, rank: int, ranks: int, mode: str, begun: int) -> None:
    join(folder, rank, ranks, "check")
    run = make_run(folder, ranks, "disabled", seed=7)
    step = run.checkpointer.load()
    assert step in (4, 6), step
    expected = local(snapshot(run_to(folder / "unused", step, ranks, "disabled")))
    assert equal(local(snapshot(run)), expected), step
    run.train(6 - step or 2)
    following = 6 if step == 4 else 8
    assert run.checkpointer.save(following)
    left = {entry.name for entry in run.checkpointer.folder.iterdir()}
    assert left == {f"step-{following - 2}", f"step-{following}"}, left
    assert make_run(folder, ranks, "disabled").checkpointer.load() == following
    os.write(begun, bytes([step]))


def fork(action, folder: Path, ranks: int, mode: str, mute: bool) -> tuple[list[int], int]:
    """Start the ranks; their process ids, and a pipe that they write to."""
    read_end, write_end = os.pipe()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            if mute:  # a rank whose peer is killed has something to say
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
            status = 1
            try:
                action(folder, rank, ranks, mode, write_end)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(write_end)
    return children, read_end


def wait_for(children: list[int], seconds: float) -> list[int]:
    """Exit statuses; who is still there after `seconds` is killed (a peer of a dead rank)."""
    deadline, statuses = time.monotonic() + seconds, []
    for child in children:
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        statuses.append(os.waitstatus_to_exitcode(found[1]))
    return statuses


def read(pipe: int, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := os.read(pipe, count - len(data))):
        data += more
    return data


def whole_save(good: Path, ranks: int, mode: str) -> float:
    """Seconds from the beginning of a save to its end."""
    children, pipe = fork(save, good, ranks, mode, mute=False)
    assert read(pipe, ranks) == b"b" * ranks
    start = time.monotonic()
    read(pipe, ranks)
    seconds = time.monotonic() - start
    assert wait_for(children, 60) == [0] * ranks
    os.close(pipe)
    return seconds


def prepare(good: Path, rank: int, ranks: int, mode: str, begun: int) -> None:
    join(good, rank, ranks, "prepare")
    run = make_run(good, ranks, "disabled")
    torch.manual_seed(0)
    for step in (2, 4):
        run.train(2)
        run.checkpointer.save(step)


def kill_in_save(good: Path, folder: Path, ranks: int, mode: str, seconds: float, rng) -> int:
    """The step that the run resumes at."""
    shutil.copytree(good, folder)
    children, pipe = fork(save, folder, ranks, mode, mute=True)
    read(pipe, ranks)  # both begin
    time.sleep(rng.uniform(0, 1.2 * seconds))
    victims = children if rng.random() < 0.5 else [rng.choice(children)]
    for child in victims:
        os.kill(child, signal.SIGKILL)
    wait_for(children, 20)
    os.close(pipe)
    children, pipe = fork(check, folder, ranks, mode, mute=False)
    assert wait_for(children, 60) == [0] * ranks
    resumed = read(pipe, ranks)
    assert len(set(resumed)) == 1
    os.close(pipe)
    shutil.rmtree(folder)
    return resumed[0]


def main() -> None:
    base, count = Path(sys.argv[1]), int(sys.argv[2])
    rng, found = random.Random(0), Counter()
    torch.set_num_threads(1)  # forking
    warm = run_to(base / "warm", 2, 1, "disabled")  # here, so that no fork imports what this does
    warm.checkpointer.save(2)
    assert make_run(base / "warm", 1, "disabled").checkpointer.load() == 2
    for ranks in (1, 2):
        good = base / f"good-{ranks}"
        good.mkdir(parents=True)
        children, pipe = fork(prepare, good, ranks, "disabled", mute=False)
        assert wait_for(children, 60) == [0] * ranks
        os.close(pipe)
        for mode in ("disabled", "async"):
            trial = base / "trial"
            shutil.copytree(good, trial)
            seconds = whole_save(trial, ranks, mode)
            shutil.rmtree(trial)
            for _ in range(count):
                step = kill_in_save(good, base / "killed", ranks, mode, seconds, rng)
                found["unfinished" if step == 4 else "done"] += 1
    print(f"unfinished {found['unfinished']} done {found['done']}")


if __name__ == "__main__":
    main()
