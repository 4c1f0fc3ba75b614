"""One background thread that keeps a few items ready."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Failure(NamedTuple):
    error: BaseException


class Prefetcher(Generic[T]):
    """Calls `produce` in a thread, at most `depth` items ahead of `get`.

    Whatever `produce` raises (tokenizers in Rust raise BaseExceptions) is raised by the `get` whose
    item it should have made, and by every later one; the thread ends with it. A `get` doesn't wait
    for a thread that is gone. `close` ends the thread and waits for it.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._produce = produce
        self._items: queue.Queue[T | _Failure] = queue.Queue(depth)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> T:
        """The next item, in order; waits for it. Error: what the thread died of, at every call."""
        while self._error is None:
            alive = self._thread.is_alive()  # before the queue is looked into: it fills it
            try:
                item = self._items.get(timeout=1.0 if alive else 0.0)
            except queue.Empty:
                if not alive:
                    self._error = RuntimeError("the thread that reads data is gone")
                continue
            if not isinstance(item, _Failure):
                return item
            self._error = item.error
        raise self._error

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        item: T | _Failure | None = None
        while not self._closing.is_set() and not isinstance(item, _Failure):
            try:
                item = self._produce()
            except BaseException as e:  # handed to the consumer, who can act on it
                item = _Failure(e)
            while not self._closing.is_set():
                try:
                    self._items.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
