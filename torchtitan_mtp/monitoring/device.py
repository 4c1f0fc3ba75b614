"""What the device can do (FLOP/s), which precision it prefers, and how much memory is in use."""

import functools
import logging
import re
import resource
import statistics
import sys
import time

import torch
from torch.utils.benchmark import Timer

from torchtitan_mtp.distributed.memory import GIB, total_memory
from torchtitan_mtp.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s from the makers' data sheets (which often print the sparse figure, twice
# this). A device matches when its name has all the words; of several names that match, the one with
# most words counts. An MI250X is two devices to torch.
PEAK_BF16_TFLOPS = {
    "GB200": 2500, "MI355X": 2500, "B200": 2250, "MI325X": 1307, "MI300X": 1307,
    "H200": 989, "GH200": 989, "H100": 989, "H800": 989, "H200 NVL": 835, "H100 NVL": 835,
    "H100 PCIE": 756, "L40S": 362, "A100": 312, "A800": 312, "MI250X": 191.5, "L40": 181,
    "A40": 149.7, "H20": 148, "L4": 121,
}  # fmt: skip


def peak_flops_by_name(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the named GPU, or None for one that the table does not hold."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    known = [name for name in PEAK_BF16_TFLOPS if words.issuperset(name.split())]
    return PEAK_BF16_TFLOPS[max(known, key=len)] * 1e12 if known else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The rate, in FLOP/s, that counts as 100% in MFU; None when it is not known.

    On CUDA the data sheet's dense bfloat16 rate, whatever `dtype` is, as is the custom. A CPU has
    no such figure: there it is that of the fastest product of a linear layer in `dtype`.
    """
    if device.type == "cpu":
        rate = max(measure_linear_rates(dtype))
        logger.info("CPU: %.1f GFLOP/s measured in %s matmuls (100%% in MFU)", rate / 1e9, dtype)
        return rate
    name = torch.cuda.get_device_name(device)
    known = peak_flops_by_name(name)
    if known is None:
        logger.warning("no peak FLOP/s known for %r: MFU is not shown", name)
    else:
        logger.info("%s: %.0f TFLOP/s peak (bfloat16, dense; 100%% in MFU)", name, known / 1e12)
    return known


@functools.cache
def measure_linear_rates(dtype: torch.dtype) -> list[float]:
    """FLOP/s of a square linear layer's three products on this CPU: one thread's, times the threads
    torch uses. Measured once a process.

    All three (y = x @ weight.T, and the gradients of x and weight), because a CPU without bfloat16
    units may have a fast kernel for one of them, and take ten times as long for another. One
    thread, because several wait for one another wherever the cores are shared, and then say more
    about the neighbours than about `dtype`. The best time of each counts.
    """
    size = 512
    x, weight = torch.ones(2, size, size, dtype=dtype)
    rates = []
    for product in ("x @ weight.T", "x @ weight", "x.T @ weight"):
        factors = {"x": x, "weight": weight}
        timer = Timer(product, globals=factors, timer=time.perf_counter)  # on one thread
        best = min(timer.blocked_autorange(min_run_time=0.05).times)
        rates.append(torch.get_num_threads() * 2 * size**3 / best)
    return rates


def resolve_auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32, else float32.

    Rank 0 decides for all (a collective when a process group exists): the ranks must agree, and
    measured times never quite do.
    """
    if device.type != "cpu":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32

    def faster() -> torch.dtype:
        bf16, fp32 = (
            statistics.harmonic_mean(measure_linear_rates(dtype))
            for dtype in (torch.bfloat16, torch.float32)
        )
        logger.info("auto precision: bfloat16 %.1f, float32 %.1f GFLOP/s", bf16 / 1e9, fp32 / 1e9)
        return torch.bfloat16 if bf16 > fp32 else torch.float32

    return Ranks().on_rank_0(faster)


class MemoryMonitor:
    """Peak memory of `device`.

    On CUDA what the caching allocator had active and reserved since the last `reset()`. On a CPU
    both are the peak resident set of this process since it started, which nothing resets, in
    percent of the machine's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capacity = total_memory(device)
        self.reset()

    def peak(self) -> dict[str, float]:
        """TorchTitan's memory tags: peaks since the last reset in GiB and in percent of the device,
        and allocator trouble."""
        if self.device.type == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            active = reserved = peak if sys.platform == "darwin" else peak * 1024  # Linux: KiB
            retries = ooms = 0
        else:
            stats = torch.cuda.memory_stats(self.device)
            active = stats.get("active_bytes.all.peak", 0)
            reserved = stats.get("reserved_bytes.all.peak", 0)
            retries, ooms = stats.get("num_alloc_retries", 0), stats.get("num_ooms", 0)
            if retries or ooms:
                logger.warning("CUDA memory: %d allocation retries, %d OOMs", retries, ooms)
        return {
            "memory/max_active(GiB)": active / GIB,
            "memory/max_active(%)": 100 * active / self.capacity,
            "memory/max_reserved(GiB)": reserved / GIB,
            "memory/max_reserved(%)": 100 * reserved / self.capacity,
            "memory/num_alloc_retries": retries,
            "memory/num_ooms": ooms,
        }

    def reset(self) -> None:
        if self.device.type != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
