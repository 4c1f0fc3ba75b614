"""Garbage is collected at the chosen steps and at no others."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from torchtitan_mtp.monitoring.gc import GarbageCollection


class Node:
    """Garbage for the collector: it refers to itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collecting_again() -> Iterator[None]:
    yield
    gc.enable()


def steps_until_collected(collection: GarbageCollection, steps: int) -> int | None:
    garbage = weakref.ref(Node())
    for step in range(1, steps + 1):
        collection.run(step)
        if garbage() is None:
            return step
    return None


def test_collects_every_freq_steps() -> None:
    collection = GarbageCollection(5)
    assert not gc.isenabled()
    assert steps_until_collected(collection, 4) is None
    assert steps_until_collected(collection, 9) == 5


def test_debug_collects_at_every_step() -> None:
    collection = GarbageCollection(50, debug=True)
    assert steps_until_collected(collection, 3) == 1


def test_close_gives_collection_back() -> None:
    collection = GarbageCollection(5)
    collection.close()
    assert gc.isenabled()
