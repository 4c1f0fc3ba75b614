"""What GPUs do in a second, by their makers' data sheets, and what of it is taken to be reached."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.streams import Rates
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.monitoring.device import peak_flops_by_name

# Of the data sheet's figure. Measured on one H100 (docs/performance.md): products of side 8192 at
# 715 TFLOP/s and copies at 2.9 TB/s. Attention and links were not: FlashAttention's own figures,
# and what NCCL commonly has of NVLink.
PRODUCTS, ATTENTION, MEMORY, LINKS = 0.72, 0.4, 0.87, 0.75


@dataclass(frozen=True)
class Device:
    """memory: GiB, as torch tells them. bandwidth: of it, in GB/s. within, between: GB/s that a
    GPU sends to others of its machine (NVLink, one direction) and of others (its network card)."""

    memory: float
    bandwidth: float
    within: float
    between: float


DEVICES = {  # in machines of eight: DGX A100, H100, H200, B200
    "a100": Device(79.3, 2039, 300, 25),
    "h100": Device(79.6, 3350, 450, 50),
    "h200": Device(140, 4800, 450, 50),
    "b200": Device(179, 8000, 900, 50),
}


def device_named(name: str) -> Device:
    """Error: one that is not in the table."""
    if name not in DEVICES:
        raise UserError(f'--device {name}: expected "cpu" or one of {", ".join(DEVICES)}')
    return DEVICES[name]


def peak_of(name: str) -> float:
    """Dense bfloat16 FLOP/s of a device."""
    found = peak_flops_by_name(name)
    assert found is not None
    return found


def rates_of(device: Device, flops: float, machine: int) -> Rates:
    """What is reached: of `flops` a second, in machines of so many."""
    return Rates(
        link=LINKS * device.within * 1e9,
        between=LINKS * device.between * 1e9,
        machine=machine,
        products=PRODUCTS * flops,
        attention=ATTENTION * flops,
        memory=MEMORY * device.bandwidth * 1e9,
    )
