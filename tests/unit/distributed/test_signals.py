import os
import signal
import time

import pytest

from torchtitan_mtp.distributed.stopping import Stopping


@pytest.mark.timeout(20)
def test_a_run_that_cannot_hear_signals_any_more_stops(monkeypatch, caplog):
    def broken(*_):
        raise OSError(5, "Input/output error")

    stopping = Stopping()
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", broken)
        with stopping:
            while not stopping.agreed() or "Input/output error" not in caplog.text:
                time.sleep(0.01)
    assert stopping.signal == signal.SIGTERM
    assert "signals can't be read any more" in caplog.text
