"""What only watches a run, and so must never end it."""

import logging
from collections.abc import Callable
from typing import Any

from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)


class Observer:
    """What `make` returns, such as an event file: it warns at its first failure and is then left
    alone; its methods give None where they fail."""

    def __init__(self, what: str, make: Callable[[], Any] = lambda: None) -> None:
        self._what, self._failed = what, False
        self._watching = self.attempt(make)

    def attempt(self, act: Callable[..., Any], *args: Any) -> Any:
        """`act(*args)`, unless something failed before. A UserError, as of a missing package, is
        raised."""
        if self._failed:
            return None
        try:
            return act(*args)
        except UserError:
            raise
        except Exception as error:
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s: %s; the run goes on without it", self._what, reason)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self.attempt(lambda: getattr(self._watching, name)(*args))
