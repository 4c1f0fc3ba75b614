"""Steps that are recorded and launched again, and over how many keys. A recording on the CPU: the
operations of one step on the tensors that they ran on, which are all that a CUDA graph has, too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_model
from torch.fx.experimental.proxy_tensor import make_fx

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import decoding, generate, static_steps
from torchtitan_mtp.inference.static_steps import keys_for, room

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]
SAMPLED = {"temperature": 0.8, "top_k": 5, "seed": 3}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Steps that ran one by one, recordings, launches of these: counted."""
    counts = SimpleNamespace(steps=0, recordings=0, launches=0)
    step = decoding.predict_and_verify

    def one_by_one(*arguments: Any) -> torch.Tensor:
        counts.steps += 1
        return step(*arguments)

    def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        counts.recordings += 1
        graph = make_fx(step)()

        def launch() -> torch.Tensor:
            counts.launches += 1
            result: torch.Tensor = graph()
            return result

        return launch

    monkeypatch.setattr(decoding, "predict_and_verify", one_by_one)
    monkeypatch.setattr(decoding, "cuda_graph", lambda device: record)
    monkeypatch.setattr(static_steps, "FEWEST_KEYS", 20)
    return counts


@pytest.mark.parametrize(
    ("heads", "options"), [("parallel", {}), ("sequential", SAMPLED), ("medusa", {})]
)
def test_a_recorded_step_does_what_the_next_one_would(
    heads: str, options: dict[str, Any], recorded: SimpleNamespace
) -> None:
    """So it depends on nothing of the step that was recorded but where its tensors are."""
    model = random_model(heads, 3)
    options = {"speculative": True, **options}
    expected = generate(model, PROMPTS, 26, **options).tokens
    before = recorded.steps
    found = generate(model, PROMPTS, 26, cuda_graphs=True, **options).tokens
    # (The last step of the first takes less noise: it drafts no more than is wanted.)
    assert [row[:21] for row in found] == [row[:21] for row in expected]
    assert recorded.recordings == 2  # of 20 and 40 keys
    # One step of each as it is and one that is recorded; catching up after the prompt is another.
    assert recorded.steps - before == 2 + 2 + 1
    assert recorded.launches > 5


def test_plain_decoding_is_recorded(recorded: SimpleNamespace) -> None:
    model = random_model("parallel", 3)
    expected = generate(model, PROMPTS, 20).tokens
    assert generate(model, PROMPTS, 20, cuda_graphs=True).tokens == expected
    assert (recorded.recordings, recorded.launches) == (2, 19 - 2)


def test_compiled_steps_are_recorded(
    recorded: SimpleNamespace, graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph for each number of keys, and what a launch runs is that graph."""
    launched: list[str] = []

    def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: launched.append("") or step()  # type: ignore[func-returns-value]

    monkeypatch.setattr(decoding, "cuda_graph", lambda device: record)
    model = random_model("parallel", 3)
    expected = generate(model, PROMPTS, 20, speculative=True).tokens
    options = {"speculative": True, "compile": True, "cuda_graphs": True}
    assert generate(model, PROMPTS, 20, **options).tokens == expected
    assert len(graphs) == 2 and len(launched) > 3


def test_a_step_that_can_not_be_recorded_runs_as_it_is(
    recorded: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(decoding, "cuda_graph", lambda device: record)
    model = random_model("parallel", 3)
    expected = generate(model, PROMPTS, 20, speculative=True).tokens
    with caplog.at_level(logging.WARNING, "torchtitan_mtp"):
        found = generate(model, PROMPTS, 20, speculative=True, cuda_graphs=True).tokens
    assert found == expected
    assert [record.message for record in caplog.records] == [
        "no CUDA graph of a step: operation not permitted when stream is capturing; decoding goes "
        "on without"
    ]


def test_growing_numbers_of_keys_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN makes a plan for each; in static shapes there are few, and every kernel may run."""
    allowed: list[bool] = []
    step = decoding.predict_and_verify

    def see(*arguments: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return step(*arguments)

    monkeypatch.setattr(decoding, "predict_and_verify", see)
    monkeypatch.setattr(decoding, "cuda_graph", lambda device: lambda step: step)
    model = random_model("parallel", 3)
    generate(model, [[1, 2]], 8, speculative=True)
    assert set(allowed) == {False}
    allowed.clear()
    generate(model, [[1, 2]], 8, speculative=True, cuda_graphs=True)
    assert set(allowed) == {True}


def test_keys_come_in_few_numbers() -> None:
    assert [room(n) for n in (1, 128, 129)] == [128, 128, 256]
    assert keys_for(100, most=256) == 256  # one number for all but long texts
    numbers = {keys_for(length, most=5120) for length in range(1, 5121)}
    assert numbers == {1024, 2048, 4096, 5120}
    assert all(keys_for(length, 5120) >= length for length in range(1, 5121))


def test_graphs_of_a_gpu_need_one() -> None:
    with pytest.raises(UserError, match="cuda_graphs: they are of GPUs"):
        generate(random_model("parallel", 3), PROMPTS, 5, cuda_graphs=True)
