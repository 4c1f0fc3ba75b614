"""One background thread that keeps a few items ready."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `produce` in a thread, at most `depth` items ahead of `get`.

    What `produce` raises is raised by the `get` whose item it should have made, and by every later
    one; the thread ends with it. `close` ends the thread and waits for it.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._produce = produce
        self._items: queue.Queue[T | Exception] = queue.Queue(depth)
        self._closing = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> T:
        if self._error is not None:
            raise self._error
        item = self._items.get()
        if isinstance(item, Exception):
            self._error = item
            raise item
        return item

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            item: T | Exception
            try:
                item = self._produce()
            except Exception as e:  # handed to the consumer, who can act on it
                item = e
            while not self._closing.is_set():
                try:
                    self._items.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
