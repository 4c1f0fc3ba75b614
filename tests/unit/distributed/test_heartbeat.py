"""Who is missing, by what the ranks left in the store."""

import logging
import time

import pytest
import torch.distributed as dist

from torchtitan_mtp.distributed import heartbeat
from torchtitan_mtp.distributed.heartbeat import Heartbeat, LostContact, lost_contact

GLOO = "[/x/gloo/transport/tcp/pair.cc:1] Read error [::1]: reset. This is typically. More"


@pytest.fixture
def store(monkeypatch):
    """This process as rank 0 of 3, with a store in memory and quick beats."""
    store = dist.HashStore()
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.05)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return dist.PrefixStore("heartbeat", store)


class Peer:
    """Another rank's beats."""

    def __init__(self, store, rank, where, alive=True):
        heart = Heartbeat(10)
        heart._rank, heart.where, self.heart, self.alive = rank, where, heart, alive
        self.store = store

    def __enter__(self):
        if self.alive:
            self.heart.__enter__()
        else:
            self.store.set(str(self.heart._rank), f"5\n{self.heart.where}\nhost-b (process 7)")

    def __exit__(self, *_):
        self.heart._end.set()


def failure(store, first, second) -> str:
    """What rank 0 says when a collective fails in step 7."""
    heart = Heartbeat(10)
    with first, second, pytest.raises(LostContact) as error, heart:
        heart.where = "step 7"
        time.sleep(0.2)
        raise RuntimeError(GLOO)
    return str(error.value)


def test_a_silent_rank_is_named(store):
    said = failure(store, Peer(store, 1, "step 7"), Peer(store, 2, "step 6", alive=False))
    assert said == (
        "step 7: rank 2 gives no sign of life, last seen in step 6 on host-b (process 7) "
        "(Read error [::1]: reset)"
    )


def test_a_rank_that_is_elsewhere_is_named(store):
    said = failure(store, Peer(store, 1, "step 7"), Peer(store, 2, "step 7, reading data"))
    assert said.startswith("step 7: rank 2 is in step 7, reading data (")


def test_nobody_in_particular(store):
    said = failure(store, Peer(store, 1, "step 7"), Peer(store, 2, "step 7"))
    assert said.startswith("step 7: no answer of another rank for 10 s, all are in step 7 (")


def test_who_is_missing_is_said_before_the_watchdog_ends_the_process(store, caplog):
    logging.getLogger("torchtitan_mtp").propagate = True
    with Peer(store, 1, "step 7"), Peer(store, 2, "step 7", alive=False), Heartbeat(1) as heart:
        heart.where = "step 7"
        time.sleep(2)
    lines = [record.message for record in caplog.records if "no sign of life" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("step 7 for ") and "s: rank 2 gives no sign" in lines[0]


def test_a_long_step_of_all_is_nothing_to_report(store, caplog):
    logging.getLogger("torchtitan_mtp").propagate = True
    with Peer(store, 1, "step 7"), Peer(store, 2, "step 7"), Heartbeat(1) as heart:
        heart.where = "step 7"
        time.sleep(1.5)
    assert not caplog.records


def test_other_errors_pass(store):
    with pytest.raises(RuntimeError, match="shape"), Heartbeat(10):
        raise RuntimeError("shape '[2]' is invalid")
    assert lost_contact(dist.DistBackendError("NCCL error"))
    try:
        try:
            raise RuntimeError(GLOO)
        except RuntimeError as error:
            raise ValueError("wrapped") from error
    except ValueError as error:
        assert lost_contact(error)
