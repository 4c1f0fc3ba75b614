"""One thread on the CPU, and nothing of one test is left for the next."""

from collections.abc import Iterator

import pytest

from runs import a_world


@pytest.fixture(autouse=True)
def own_world() -> Iterator[None]:
    with a_world():
        yield
