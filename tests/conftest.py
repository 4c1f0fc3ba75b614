"""What holds for every test: a fixed seed, and the `distributed` mark on tests/distributed."""

from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parent / "distributed"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if DISTRIBUTED in item.path.parents:
            item.add_marker(pytest.mark.distributed)
