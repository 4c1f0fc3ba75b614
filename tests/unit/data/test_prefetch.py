import itertools
import threading
import time

import pytest

from torchtitan_mtp.data.prefetch import Prefetcher


class Panic(BaseException):
    """As pyo3's PanicException, which tokenizers written in Rust raise."""


def test_items_in_order_and_no_further_ahead_than_the_depth():
    made = []

    def produce():
        made.append(len(made))
        return made[-1]

    prefetcher = Prefetcher(produce, 2)
    for i in range(20):
        assert prefetcher.get() == i
        assert len(made) <= i + 1 + 2 + 1  # two in the queue, one in the thread's hands
    prefetcher.close()


def test_close_ends_the_thread_whether_or_not_its_queue_is_full():
    before = threading.active_count()
    prefetcher = Prefetcher(itertools.count().__next__, 1)
    time.sleep(0.05)
    assert threading.active_count() == before + 1
    prefetcher.close()
    assert threading.active_count() == before
    prefetcher.close()


@pytest.mark.timeout(10)
@pytest.mark.parametrize("error", [OSError, Panic, KeyboardInterrupt])
def test_an_error_is_raised_at_its_item_and_ever_after(error):
    items = iter([1, 2])

    def produce():
        for item in items:
            return item
        raise error("gone")

    prefetcher = Prefetcher(produce, 4)
    assert [prefetcher.get(), prefetcher.get()] == [1, 2]
    for _ in range(2):
        with pytest.raises(error, match="gone"):
            prefetcher.get()
    prefetcher.close()


def test_nobody_waits_for_a_thread_that_is_gone():
    prefetcher = Prefetcher(itertools.count().__next__, 2)
    assert prefetcher.get() == 0
    prefetcher.close()
    with pytest.raises(RuntimeError, match="the thread that reads data is gone"):
        for _ in range(5):  # what it had ready comes first
            prefetcher.get()
