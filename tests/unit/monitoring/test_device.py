"""Peak rates, precision and memory of the device."""

import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from torchtitan_mtp.monitoring import device as device_module
from torchtitan_mtp.monitoring.device import (
    GIB,
    MemoryMonitor,
    measure_linear_rates,
    peak_flops,
    peak_flops_by_name,
    resolve_auto_dtype,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peak_by_device_name(name: str, teraflops: float) -> None:
    assert peak_flops_by_name(name) == teraflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA T4", "Imaginary GPU"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops_by_name(name) is None


def test_an_unknown_device_is_logged_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    monkeypatch.setattr(logging.getLogger("torchtitan_mtp"), "propagate", True)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) is None
    assert caplog.messages == ["no peak FLOP/s known for 'Imaginary GPU': MFU is not shown"]


def test_rates_are_plausible_quick_and_leave_the_threads() -> None:
    threads, start = torch.get_num_threads(), time.perf_counter()
    measure_linear_rates.cache_clear()
    rates = measure_linear_rates(torch.float32)
    assert len(rates) == 3 and all(1e8 < rate < 1e14 for rate in rates)
    assert time.perf_counter() - start < 2
    assert torch.get_num_threads() == threads
    assert measure_linear_rates(torch.float32) is rates  # once a process


# FLOP/s of a thread by whether the factors are transposed: what a CPU without bfloat16 units did
# in products of 256 (ONEDNN_MAX_CPU_ISA=AVX2 makes one of any).
RATES = {(False, False): 2.4e9, (False, True): 15.6e9, (True, False): 23.5e9}


@pytest.fixture
def cpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its clock, moved on by products alone."""
    now, product = [0.0], torch.Tensor.__matmul__

    def timed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kind = (not a.is_contiguous(), not b.is_contiguous())
        now[0] += 2 * a.shape[0] * a.shape[1] * b.shape[1] / RATES[kind]
        return product(a.float(), b.float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(device_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    measure_linear_rates.cache_clear()
    yield
    measure_linear_rates.cache_clear()


def test_the_peak_is_that_of_the_fastest_product_of_a_layer(cpu_without_bfloat16: None) -> None:
    """So that no run, made of these three, has an MFU above 100%."""
    peak = peak_flops(CPU, torch.bfloat16)
    assert peak == pytest.approx(23.5e9 * torch.get_num_threads())
    speed = torch.get_num_threads() * 3 / sum(1 / rate for rate in RATES.values())
    assert speed / peak == pytest.approx(0.244, abs=1e-3)


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_auto_precision_is_the_faster_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, faster: torch.dtype
) -> None:
    rates = {torch.bfloat16: 1e9, torch.float32: 1e9}
    rates[faster] = 2e9
    monkeypatch.setattr(device_module, "measure_linear_rates", lambda dtype: [rates[dtype]] * 3)
    assert resolve_auto_dtype(CPU) == faster


def test_auto_precision_is_rank_0s_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[None, None], [torch.bfloat16, None]])  # nobody failed; the choice

    def gather(values: list[object], value: object, group: None) -> None:
        values[:] = next(answers)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(device_module, "measure_linear_rates", None)  # rank 1 measures nothing
    assert resolve_auto_dtype(CPU) == torch.bfloat16


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_on_cuda(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_auto_dtype(torch.device("cuda")) == expected


def test_cpu_memory_is_the_peak_resident_set() -> None:
    monitor = MemoryMonitor(CPU)
    before = monitor.peak()
    block = torch.ones(GIB // 4 // 4)  # a quarter GiB, every page touched
    del block
    after = monitor.peak()
    assert after["memory/max_reserved(GiB)"] >= before["memory/max_reserved(GiB)"]
    assert after["memory/max_reserved(GiB)"] > 0.25
    assert after["memory/max_active(GiB)"] == after["memory/max_reserved(GiB)"]
    assert 0 < after["memory/max_active(%)"] < 100
    assert (after["memory/num_alloc_retries"], after["memory/num_ooms"]) == (0, 0)
