"""What holds for these tests: one thread, and a compiler that only counts its graphs."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchtitan_mtp.inference import decoding


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More, for models this small, only wait for one another, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that decoding has compiled, for the reference backend, which runs them as is."""
    compiled: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(decoding.torch, "compile", functools.partial(torch.compile, backend=keep))
    decoding._compiled.cache_clear()
    yield compiled
    decoding._compiled.cache_clear()
