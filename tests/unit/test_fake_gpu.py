"""What scripts/benchmarks/fake_gpu.py counts: bytes by hand, and as one H100 had them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks import heads
from benchmarks.fake_gpu import fake_gpu
from benchmarks.measure import in_process
from benchmarks.memory import bytes_at_peak

from torchtitan_mtp.config import parse_args
from torchtitan_mtp.distributed.mesh import Degrees
from torchtitan_mtp.ops import linear_cross_entropy

RANKS, DIM, HIDDEN, VOCAB, SEQ = 4, 32, 64, 4096, 64
SMALL = f"""
--model.name llama3 --model.flavor custom --model.vocab_size {VOCAB} --model.args.dim {DIM}
--model.args.n_layers 2 --model.args.n_heads 4 --model.args.hidden_dim {HIDDEN}
--model.converters mtp --activation_checkpoint.mode none
--training.seq_len {SEQ} --validation.seq_len {SEQ} --training.local_batch_size 1
"""


def a_few_operations() -> list[tuple[int, int]]:
    """Bytes alive after each, and most of them in it."""
    found = []
    with fake_gpu(Degrees()) as (world, allocations):

        def look() -> None:
            found.append((allocations.alive, allocations.peak))
            allocations.begin()

        x = torch.empty(8, 4, device=world.device, requires_grad=True)
        w = torch.empty(16, 4, device=world.device, dtype=torch.bfloat16)
        look()
        h = x @ w.float().T
        y = F.silu(h)
        total = (y * y).sum()
        look()
        part = h[2:4].view(-1)
        del h, y, total
        look()
        part.untyped_storage().resize_(0)
        look()
    return found


def a_loss_in_chunks() -> int:
    """Most bytes that the loss of 64 bfloat16 states in four chunks has alive above its inputs."""
    with fake_gpu(Degrees()) as (world, allocations):
        make = partial(torch.zeros, device=world.device, dtype=torch.bfloat16, requires_grad=True)
        hidden, weight = make(64, DIM), make(VOCAB, DIM)
        labels = torch.zeros(64, 1, device=world.device, dtype=torch.int64)
        before = allocations.alive
        linear_cross_entropy([hidden], weight, labels, chunk_rows=16)
        return allocations.peak - before


def counts() -> dict[str, Any]:
    """All that a process of its own has to count; "steps": heads and n -> a step's peak."""

    def count(heads: str, n: int) -> dict[str, int]:
        options = [f"--mtp.num_future_tokens={n}", f"--mtp.heads={heads}"]
        return bytes_at_peak(parse_args([*SMALL.split(), *options]), RANKS, micro_batches=2)

    steps = {(heads, n): count(heads, n) for heads in ("parallel", "sequential") for n in (2, 4)}
    return {"operations": a_few_operations(), "loss": a_loss_in_chunks(), "steps": steps}


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return in_process(counts)


def test_bytes_by_hand(counted: dict[str, Any]) -> None:
    made, computed, dropped, resized = counted["operations"]
    x, w, h, scalar = 8 * 4 * 4, 16 * 4 * 2, 8 * 16 * 4, 4
    assert made == (x + w, x + w)
    # Autograd keeps w in float32, and y, y once more; what is summed goes.
    assert computed == (x + 3 * w + 2 * h + scalar, x + 3 * w + 3 * h + scalar)
    assert dropped == (x + 3 * w + h, x + 3 * w + 2 * h + scalar)  # h, of which `part` is a view
    assert resized == (x + 3 * w, x + 3 * w + h)


def test_the_loss_holds_one_chunk(counted: dict[str, Any]) -> None:
    """Its logits, their gradient in bfloat16, and the gradients of weight and states."""
    expected = 16 * VOCAB * (4 + 2) + VOCAB * DIM * 4 + 64 * DIM * 2
    assert expected < counted["loss"] < 1.02 * expected


def test_the_second_of_two_micro_batches_by_hand(counted: dict[str, Any]) -> None:
    found = counted["steps"]["parallel", 2]
    block = 4 * DIM * DIM + 3 * DIM * HIDDEN + 2 * DIM
    weights = 2 * VOCAB * DIM + DIM + 3 * block  # two layers and a head
    tensors = 2 + 1 + 3 * 9
    angles = 2 * SEQ * (DIM // 4 // 2) * 4
    assert found["parameters"] == 4 * weights // RANKS + angles
    assert found["moments"] == 2 * 4 * weights // RANKS + 4 * tensors  # each has a count of steps
    # Of the first micro-batch, whose loss, and loss sums, targets and hits of two heads are there.
    assert found["gradients"] == 4 * weights // RANKS + 4 + 2 * (4 + 8 + 8)
    # The loss is where most is alive: logits, their gradient in bfloat16, the weight's in float32
    # and the weight in bfloat16, which FSDP2 has twice until the next block is gathered.
    loss = SEQ * VOCAB * (4 + 2) + VOCAB * DIM * (4 + 2 + 2)
    assert loss < found["activations"] < 1.1 * loss
    assert found["total"] == sum(found.values()) - found["total"]


@pytest.mark.parametrize(("family", "states"), [("parallel", 0), ("sequential", 1)])
def test_a_step_against_n(family: str, states: int, counted: dict[str, Any]) -> None:
    two, four = (counted["steps"][family, n]["activations"] for n in (2, 4))
    # bfloat16; a head's labels and tokens; its sums
    state, ids, few = 2 * SEQ * DIM, 16 * SEQ, 150
    assert 2 * states * state <= four - two <= 2 * (states * state + ids + few)


# docs/performance.md: heads and engine, n, MiB that torch.cuda.max_memory_allocated found.
H100 = [
    ("plain", 1, 4232),
    ("parallel, head by head", 4, 4264),
    ("chain", 8, 4376),
    ("parallel, joint", 8, 4344),
    ("logits held", 4, 19460),
    ("logits checkpointed", 4, 9944),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("case", "n", "measured"), H100)
def test_peaks_of_an_h100(case: str, n: int, measured: int) -> None:
    sizes = {"layers": 8, "dim": 2048, "vocab": 128256, "seq_len": 4096, "batch_size": 1}
    sizes |= {"ac": "none", "dtype": "bfloat16"}
    row = heads.memory_table((1, n), (case,), sizes)[-1]
    assert row["peak MiB"] == pytest.approx(measured, rel=0.01)
