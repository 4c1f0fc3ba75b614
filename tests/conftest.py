"""What holds for every test: a fixed seed, and the `distributed` mark on tests/distributed."""

import signal
from pathlib import Path

import pytest
import torch

# Ignored in what a shell without job control starts in the background; children would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DISTRIBUTED = Path(__file__).parent / "distributed"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if DISTRIBUTED in item.path.parents:
            item.add_marker(pytest.mark.distributed)
