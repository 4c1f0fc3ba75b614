"""A trunk that transformers runs, through everything a training adds: FSDP2 on two ranks equals one
process, activation checkpointing and compilation change no loss and no gradient; packed documents
are as the same documents apart."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_models import CONFIGS
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
# and biases; scales; latent attention; a recurrent state.
FAMILIES = ["llama_tied", "gemma2", "gemma3", "gpt_oss", "granite", "deepseek_v3", "qwen3_next"]
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


def on_rank(rank: int, cases) -> list:
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


def alone(family: str, heads: str, mask: str = "causal") -> HFTrunk:
    model = built(family, heads, mask)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed=5)
    return model


def test_two_ranks_are_one_process() -> None:
    cases = [(f, h) for f in FAMILIES for h in ("parallel", "sequential")]
    results = run_ranks(2, on_rank, cases, timeout=280)
    batches = [make_batch(window_of(rank), N) for rank in range(2)]
    batch = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    valid = (batch.labels != IGNORE).sum((0, 1))
    for index, (family, heads) in enumerate(cases):
        loss, grads = step(alone(family, heads), batch, valid)
        for found, gradients in (ranks[index] for ranks in results):
            torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6, msg=f"{family} {heads}")
            assert gradients.keys() == grads.keys()
            for name, grad in grads.items():
                what = f"{family} {heads}: {name}"
                torch.testing.assert_close(gradients[name], grad, rtol=2e-3, atol=2e-6, msg=what)


@pytest.fixture(scope="module")
def world():
    return init_world(JobConfig().parallelism)


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "granite", "deepseek_v3", "phi3"])
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
