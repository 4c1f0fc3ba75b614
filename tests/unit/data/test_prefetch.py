import threading
import time

import pytest

from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import ByteTokenizer


class Panic(BaseException):
    """As pyo3's PanicException, which tokenizers written in Rust raise."""


class Counting(DataLoader):
    """Fails to make its window number `until`."""

    made = 0
    until, error = -1, Panic

    def _produce(self):
        if self.made == self.until:
            raise self.error("gone")
        self.made += 1
        return super()._produce()


@pytest.fixture
def ahead(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 400)
    source = build_source("files", str(tmp_path / "a.txt"))
    loader = Counting(source, ByteTokenizer(), 16, 2, 1, split="all", prefetch=2)
    yield loader
    loader.close()


def test_windows_are_made_ahead_and_no_further_than_asked(ahead):
    assert ahead.made == 0
    for i in range(20):
        ahead.next_window()
        assert ahead.made <= i + 1 + 2
    for _ in range(100):
        if ahead.made < 22:
            time.sleep(0.05)
    assert ahead.made == 22


def test_close_ends_the_thread(ahead):
    before = threading.active_count()
    for _ in range(2):
        ahead.next_window()
        assert threading.active_count() == before + 1
        ahead.close()
        assert threading.active_count() == before
        ahead.close()


@pytest.mark.timeout(10)
@pytest.mark.parametrize("error", [OSError, Panic, KeyboardInterrupt])
def test_an_error_is_raised_at_its_window_and_ever_after(ahead, error):
    ahead.until, ahead.error = 2, error
    ahead.next_window()
    ahead.next_window()
    for _ in range(2):
        with pytest.raises(error, match="gone"):
            ahead.next_window()
