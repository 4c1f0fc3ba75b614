"""Decoding on a GPU: the tokens of full forwards in float64 on the CPU, and a known text."""

from __future__ import annotations

import logging

import pytest
import torch
from on_device import GPU, at_length, in_every_suite
from test_decoding import SCRIPTS
from test_latent_decoding import KINDS
from tiny_models import FAMILIES, naive_greedy, random_model, scripted_model

from torchtitan_mtp.inference import generate

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]
MODELS = [(heads, share, {}) for heads, share in FAMILIES]
MODELS += [("sequential", False, {"n_kv_heads": None, **KINDS["deepseek"]})]


def ways(device: str) -> list[dict[str, bool]]:
    graphs = (False, True) if device == "cuda" else (False,)
    return [{"speculative": s, "cuda_graphs": g} for s in (False, True) for g in graphs]


@at_length
@pytest.mark.parametrize(("heads", "share", "shape"), MODELS)
def test_tokens_are_those_of_full_forwards(heads, share, shape, device, caplog):
    """One by one or drafted, one kernel after another or as CUDA graphs, which are recorded."""
    model = random_model(heads, 4, share, seed=4, **shape)
    expected = [naive_greedy(model, prompt, 20, 4) for prompt in PROMPTS]
    model.to(device)
    with caplog.at_level(logging.WARNING, "torchtitan_mtp"):
        for how in ways(device):
            assert generate(model, PROMPTS, 20, **how).tokens == expected, how
    assert caplog.messages == []


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_compiled_steps(heads, device):
    model = random_model(heads, 3, seed=4)
    expected = [naive_greedy(model, prompt, 20, 3) for prompt in PROMPTS]
    model.to(device)
    for how in ways(device)[2:]:  # drafted
        assert generate(model, PROMPTS, 20, compile=True, **how).tokens == expected, how


@in_every_suite
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
@pytest.mark.parametrize("script", ["all right", "half right"])
def test_a_known_text_in_bfloat16(script, heads, device):
    following, parallel, sequential = SCRIPTS[script]
    model = scripted_model(heads, following, parallel if heads == "parallel" else sequential)
    model.to(device, torch.bfloat16)
    expected = [0]
    for _ in range(30):
        expected.append(following[expected[-1]])
    for how in ways(device):
        assert generate(model, [[0]], 30, **how).tokens == [expected[1:]], how


@pytest.mark.parametrize("device", [GPU])
def test_a_recorded_step_is_launched_for_other_noise(device):
    """Sampled: graphs read the random numbers of their own step."""
    model = random_model("parallel", 3, seed=4).to(device)
    options = {"speculative": True, "temperature": 0.8, "top_k": 5, "seed": 3}
    expected = generate(model, PROMPTS, 40, **options).tokens
    found = generate(model, PROMPTS, 40, cuda_graphs=True, **options).tokens
    # (The last step of the first takes less noise: it drafts no more than is wanted.)
    assert [row[:35] for row in found] == [row[:35] for row in expected]
