"""What holds for every test: a fixed seed, the `distributed` mark on tests/distributed, a GPU for
the tests of one."""

import re
import signal
from pathlib import Path

import pytest
import torch

# Ignored in what a shell without job control starts in the background; children would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DISTRIBUTED = Path(__file__).parent / "distributed"


def pytest_configure(config: pytest.Config) -> None:
    """Skipped, what was asked for would look as if it had passed."""
    asked = re.findall(r"(not +)?\bcuda\b", config.option.markexpr)
    if "" in asked and not torch.cuda.is_available():
        raise pytest.UsageError("-m cuda needs a GPU, and torch sees none on this machine")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if DISTRIBUTED in item.path.parents:
            item.add_marker(pytest.mark.distributed)
