"""A trunk that transformers runs, through everything a training adds: FSDP2 on two ranks equals one
process, also from a folder with modules and back into it; activation checkpointing and compilation
change no loss and no gradient; packed documents are as the same documents apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_models import CONFIGS
from native_folders import tensors_of, write_native
from runs import Run, config_of, largest_difference, same, train
from spawn import run_ranks
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import IGNORE, Batch, Window, make_batch
from torchtitan_mtp.distributed.mesh import all_reduce, init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.hf import HFTrunk
from torchtitan_mtp.models.hf_config import sizes_of_config
from torchtitan_mtp.mtp import ENGINES, add_heads, head_scales
from torchtitan_mtp.ops import LossOptions

# Of different kinds: tied, windows and a cap; another kind of layer for heads; experts, with sinks
# and biases; scales; latent attention; a recurrent state. Each has one kind of heads, and the other
# in an exhaustive test.
CASES = [
    ("llama_tied", "parallel"),
    ("gemma2", "sequential"),
    ("gemma3", "sequential"),
    ("gpt_oss", "parallel"),
    ("granite", "parallel"),
    ("deepseek_v3", "sequential"),
    ("qwen3_next", "parallel"),
]
OTHERS = [(f, "parallel" if heads == "sequential" else "sequential") for f, heads in CASES]
SEQ, N = 12, 3


def window_of(rank: int) -> Window:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(3, 64, (2, SEQ + N), generator=generator)
    docs = torch.zeros_like(tokens)
    docs[1, 5 + rank :] = 1
    docs[0, 9 + 3 * rank :] = -1
    return Window(tokens, docs)


def built(family: str, heads: str, mask: str = "causal") -> HFTrunk:
    config = CONFIGS[family]()
    model = HFTrunk(config, sizes_of_config(config, SEQ, mask))
    add_heads(model, MTP(heads=heads, num_future_tokens=N))
    return model


def step(model: HFTrunk, batch: Batch, valid: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The loss and all gradients, whole."""
    scales = head_scales([1.0, 0.5, 2.0], valid)
    options = LossOptions(softcap=model.softcap)
    out = ENGINES["head_by_head"](model, batch, scales, options, True)
    grads = {}
    for name, param in model.named_parameters():
        grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        # An expert's parameter that no token reached may have no gradient, or a zero one.
        grads[name] = torch.zeros(param.shape) if grad is None else grad
    return out.loss, grads


def parallelized(model: HFTrunk, world, ac: str = "none", compiled: bool = False) -> HFTrunk:
    config = JobConfig()
    config.activation_checkpoint.mode = ac
    config.compile.enable, config.compile.backend = compiled, "aot_eager"
    return parallelize(model, config, world, torch.float32, seed=5)


NATIVE = "deepseek_v3"  # a folder with two modules, which are heads 2 and 3


def train_native(folder: Path, run: str, batch_size: int) -> Run:
    """A step of the modules of `folder`/model, and the folder that it leaves."""
    keys: dict[str, Any] = {"model.name": "hf", "model.hf_assets_path": str(folder / "model")}
    keys |= {"mtp.heads": "sequential", "mtp.train": "heads", "optimizer.lr": 1e-2}
    keys |= {"checkpoint.enable": True, "checkpoint.initial_load_in_hf": True}
    keys |= {"checkpoint.last_save_in_hf": True, "job.dump_folder": str(folder / run)}
    keys |= {"training.steps": 1, "training.local_batch_size": batch_size}
    return train(config_of(folder, keys))


def steps_on_rank(rank: int, cases: list[tuple[str, str]]) -> list:
    world = init_world(JobConfig().parallelism)
    results = []
    for family, heads in cases:
        torch.manual_seed(0)
        model = parallelized(built(family, heads), world)
        batch = make_batch(window_of(rank), N)
        valid = all_reduce((batch.labels != IGNORE).sum((0, 1)))
        loss, grads = step(model, batch, valid)
        results.append((all_reduce(loss.clone()), grads))
    return results


def on_rank(rank: int, folder: Path) -> tuple[list, Run]:
    return steps_on_rank(rank, CASES), train_native(folder, "two ranks", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trunks")
    write_native(path / "model", NATIVE, 2)
    config_of(path)  # writes the corpus
    return path


@pytest.fixture(scope="module")
def ranks(folder) -> list[tuple[list, Run]]:
    return run_ranks(2, on_rank, folder, timeout=280)


def alone(family: str, heads: str, mask: str = "causal") -> HFTrunk:
    model = built(family, heads, mask)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed=5)
    return model


def assert_one_process(cases: list[tuple[str, str]], of_ranks: list[list]) -> None:
    batches = [make_batch(window_of(rank), N) for rank in range(2)]
    batch = Batch(*(torch.cat(parts) for parts in zip(*(b[:5] for b in batches), strict=True)))
    valid = (batch.labels != IGNORE).sum((0, 1))
    for index, (family, heads) in enumerate(cases):
        loss, grads = step(alone(family, heads), batch, valid)
        for found, gradients in (results[index] for results in of_ranks):
            torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6, msg=f"{family} {heads}")
            assert gradients.keys() == grads.keys()
            for name, grad in grads.items():
                what = f"{family} {heads}: {name}"
                torch.testing.assert_close(gradients[name], grad, rtol=2e-3, atol=2e-6, msg=what)


def test_two_ranks_are_one_process(ranks) -> None:
    assert_one_process(CASES, [results for results, _ in ranks])


@pytest.mark.exhaustive
def test_two_ranks_are_one_process_with_the_other_heads() -> None:
    assert_one_process(OTHERS, run_ranks(2, steps_on_rank, OTHERS, timeout=280))


def test_modules_of_a_folder_train_on_two_ranks_as_in_one_process(ranks, folder) -> None:
    """And the folder that is left is the same, too."""
    (_, first), (_, second) = ranks
    run = train_native(folder, "alone", 4)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)
    assert first.losses == second.losses and same(first.weights, second.weights)
    torch.testing.assert_close(first.losses, run.losses, rtol=1e-5, atol=0)
    assert same(first.trunk, run.trunk)  # frozen
    assert largest_difference(first.weights, run.weights) < 5e-5

    released = folder / "model"
    left = [folder / name / "checkpoint" / "step-1.hf" for name in ("two ranks", "alone")]
    for file in released.iterdir():
        found = [(path / file.name).read_bytes() for path in left]
        if file.name != "model-00003-of-00003.safetensors":
            assert found == [file.read_bytes()] * 2, file.name
    before, two, one = (tensors_of(path) for path in (released, *left))
    assert before.keys() == one.keys()
    assert largest_difference(two, one) < 5e-5
    assert largest_difference(before, one) > 1e-3


@pytest.fixture(scope="module")
def world():
    return init_world(JobConfig().parallelism)


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("gemma3", "sequential"),
        ("deepseek_v3", "parallel"),
        pytest.param("llama_tied", "parallel", marks=pytest.mark.exhaustive),
        pytest.param("deepseek_v3", "sequential", marks=pytest.mark.exhaustive),
        pytest.param("llama_tied", "sequential", marks=pytest.mark.exhaustive),
        pytest.param("gemma3", "parallel", marks=pytest.mark.exhaustive),
        *(
            pytest.param(family, heads, marks=pytest.mark.exhaustive)
            for family in ("granite", "phi3")
            for heads in ("parallel", "sequential")
        ),
    ],
)
def test_checkpointing_and_compilation_change_nothing(family: str, heads: str, world) -> None:
    torch.compiler.reset()  # of one code: all families' layers end in one function
    batch = make_batch(window_of(0), N)
    valid = (batch.labels != IGNORE).sum((0, 1))
    loss, grads = step(alone(family, heads), batch, valid)
    compiles = family != "deepseek_v3"  # transformers' loop over experts breaks the graph
    for ac, compiled in [("full", False), ("selective", compiles)]:
        model = parallelized(built(family, heads), world, ac, compiled)
        found, gradients = step(model, batch, valid)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
        for name, grad in gradients.items():
            plain = name.replace("_orig_mod.", "")
            torch.testing.assert_close(grad, grads[plain], rtol=2e-3, atol=2e-6, msg=name)


def test_what_cannot_keep_documents_apart_says_so() -> None:
    with pytest.raises(UserError, match=r'"block_causal": Qwen3NextForCausalLM .* set "causal"'):
        built("qwen3_next", "parallel", "block_causal")


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt_oss", "deepseek_v3", "smollm3"])
def test_packed_documents_are_the_documents_apart(family: str) -> None:
    """With block_causal, losses of two documents in a row are those of each in a row alone."""
    model = alone(family, "sequential", "block_causal")
    tokens = torch.randint(3, 64, (1, SEQ + N))
    docs = torch.zeros_like(tokens)
    docs[0, 7:] = 1
    docs[0, SEQ:] = -1
    packed = make_batch(Window(tokens, docs), N)
    apart = []
    for part, doc in ((tokens[:, :7], 7), (tokens[:, 7:SEQ], SEQ - 7)):
        room = torch.full((1, SEQ + N), 3)
        room[:, :doc] = part
        ids = torch.full_like(room, -1)
        ids[:, :doc] = 0
        apart.append(make_batch(Window(room, ids), N))
    scales = torch.ones(N)
    options = LossOptions(softcap=model.softcap)
    engine = ENGINES["head_by_head"]
    whole = engine(model, packed, scales, options, True).loss_sum
    parts = [engine(model, batch, scales, options, True).loss_sum for batch in apart]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-5)
    assert (packed.labels != IGNORE).sum() == sum((b.labels != IGNORE).sum() for b in apart)
