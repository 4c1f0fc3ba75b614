import logging
import os
import signal
import time

import pytest

from torchtitan_mtp.distributed import stopping
from torchtitan_mtp.distributed.stopping import Stopping


@pytest.mark.timeout(20)
def test_a_run_that_cannot_hear_signals_any_more_stops(monkeypatch, caplog):
    def broken(*_):
        raise OSError(5, "Input/output error")

    told = Stopping()
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", broken)
        with told:
            while not told.agreed() or "Input/output error" not in caplog.text:
                time.sleep(0.01)
    assert told.signal == signal.SIGTERM
    assert "signals can't be read any more" in caplog.text


@pytest.mark.timeout(20)
def test_a_rank_whose_torchrun_was_killed_stops_and_says_so(monkeypatch, caplog):
    """As after a SIGTERM of torchrun; what does not end within its 30 seconds is ended."""
    logging.getLogger("torchtitan_mtp").propagate = True
    ended = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setattr(stopping, "_PARENT", 4)  # now it is another
    monkeypatch.setattr(stopping, "_PATIENCE", 0.05)
    monkeypatch.setattr(os, "_exit", ended.append)
    with Stopping() as told:
        while not told.agreed() or not ended:
            time.sleep(0.01)
    assert (told.signal, ended) == (signal.SIGTERM, [143])
    assert "torchrun (process 4), which started this rank, is gone" in caplog.text


@pytest.mark.timeout(20)
def test_a_parent_that_is_no_launcher_may_go(monkeypatch):
    """As the shell of `nohup` does."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(stopping, "_PARENT", 4)
    with Stopping() as told:
        time.sleep(0.3)
        assert not told.agreed()
