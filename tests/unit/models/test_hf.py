"""A model of transformers as a trunk, with heads, against transformers alone: head 1's logits are
those of its own forward; every head's loss and all gradients are those of models that transformers
runs with the head in its place."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from hf_models import CONFIGS, OTHERS
from tests.naive import distance
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import IGNORE, Batch, Window, make_batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.hf import HFTrunk
from torchtitan_mtp.models.hf_config import sizes_of_config
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions

SEQ, N = 11, 3
SCALES = torch.tensor([0.05, 0.03, 0.02])


def build(config: Any, mtp: MTP | None = None, mask: str = "causal") -> HFTrunk:
    model = HFTrunk(config, sizes_of_config(config, SEQ, mask))
    if mtp is not None:
        add_heads(model, mtp)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed=1)
    with torch.no_grad():  # norms too, and light heads, as training leaves them
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return model


def batch_of(n: int = N, boundary: int = 7, from_head_1: bool = False) -> Batch:
    """Two rows, of which the second has a second document."""
    tokens = torch.randint(3, 64, (2, SEQ + n))
    docs = torch.zeros_like(tokens)
    docs[1, boundary:] = 1
    return make_batch(Window(tokens, docs), n, from_head_1)


def reference(config: Any, model: HFTrunk) -> Any:
    """transformers' own model with the trunk's weights."""
    own = transformers.AutoModelForCausalLM.from_config(config)
    own.set_experts_implementation(model.causal.config._experts_implementation)
    trunk = {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}
    report = own.load_state_dict(trunk, strict=True)
    assert not report.missing_keys
    return own


@pytest.mark.parametrize("family", CONFIGS | OTHERS)
def test_logits_of_head_1_are_transformers_own(family: str) -> None:
    config = (CONFIGS | OTHERS)[family]()
    model = build(config)
    batch = batch_of(1)
    with torch.no_grad():
        logits = model.output(model(batch)[0])
        if model.softcap is not None:
            logits = model.softcap * torch.tanh(logits / model.softcap)
        theirs = reference(config, model)(input_ids=batch.tokens, use_cache=False).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Whole logits, as transformers makes them of a final state."""
    config = model.config
    logits = model.get_output_embeddings()(hidden)
    logits = logits / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def with_layers(model: Any, layers: list[Any], kinds: list[str] | None) -> Any:
    """transformers' inner model of other layers, the same objects."""
    inner = copy.copy(model.base_model)
    inner.__dict__ = dict(inner.__dict__)
    inner._modules = dict(inner._modules)
    inner.layers = torch.nn.ModuleList(layers)
    inner.config = copy.deepcopy(inner.config)
    inner.config.num_hidden_layers = len(layers)
    if kinds is not None:
        inner.config.layer_types = kinds
    return inner


def naive_losses(own: Any, heads: Any, mtp: MTP, batch: Batch) -> list[Tensor]:
    """Sums of losses of heads 1..n. What a head learns from head 1 is head 1's logits where it
    predicts the same token, k-1 positions later."""
    logits = [logits_of(own, h) for h in naive_states(own, heads, mtp.heads, batch)]
    sums = []
    for k, labels in enumerate(batch.labels.unbind(-1)):
        losses = F.cross_entropy(logits[k].mT, labels, ignore_index=IGNORE, reduction="none")
        if k and mtp.target == "trunk":  # (what comes around the end has no label)
            soft = distance(logits[0].detach().roll(-k, 1), logits[k], mtp.target_loss)
            losses = mtp.target_weight * soft + (1 - mtp.target_weight) * losses
        sums.append(losses[labels != IGNORE].sum())
    return sums


def naive_states(own: Any, heads: Any, family: str, batch: Batch) -> list[Tensor]:
    """Final states of heads 1..n, by whole forwards of transformers' models."""
    inner = own.base_model
    layers = list(inner.layers)
    kinds = getattr(own.config, "layer_types", None)
    copied = max((i for i, k in enumerate(kinds or []) if k == "full_attention"), default=-1)
    kind = kinds[copied] if kinds else None
    last = inner(input_ids=batch.tokens, use_cache=False).last_hidden_state
    hiddens = [last]
    for k in range(2, N + 1):
        head = heads.heads[k - 2]
        if family == "medusa":
            hiddens.append(last + F.silu(F.linear(last, head.linear.weight)))
        elif family == "parallel":
            # The rest of the model, with the head as its last layer.
            tower = with_layers(own, [*layers[:-1], head], kinds and [*kinds[:-1], kind])
            hiddens.append(tower(input_ids=batch.tokens, use_cache=False).last_hidden_state)
        else:
            scale = getattr(own.config, "embedding_multiplier", 1.0)
            emb = inner.get_input_embeddings()(batch.future_tokens[..., k - 2]) * scale
            x = head.eh_proj(torch.cat((head.enorm(emb), head.hnorm(hiddens[-1])), dim=-1))
            tower = with_layers(own, [head.block], kinds and [kind])
            tower.norm = head.norm
            hiddens.append(tower(inputs_embeds=x / scale, use_cache=False).last_hidden_state)
    return hiddens


PAIRS = [(f, h) for f in CONFIGS for h in ("parallel", "sequential")] + [("gemma2", "medusa")]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_losses_and_gradients_equal_transformers_alone(name: str, family: str) -> None:
    check_losses_and_gradients(CONFIGS[name](), MTP(heads=family, num_future_tokens=N))


@pytest.mark.parametrize(
    "mtp",
    [
        MTP(heads="parallel", target_loss="kl"),
        MTP(heads="parallel", target_loss="tv", target_weight=0.7),
        MTP(heads="sequential", target_loss="lk"),
        MTP(heads="sequential", target_loss="kl", train="heads"),
        MTP(heads="medusa", target_loss="tv"),
    ],
    ids=lambda mtp: f"{mtp.heads}-{mtp.target_loss}-{mtp.train}",
)
@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_what_heads_learn_from_the_model_is_what_transformers_says(name: str, mtp: MTP) -> None:
    config = CONFIGS[name]()
    if name == "gemma2":
        config.final_logit_softcapping = 0.5  # which logits of small weights reach
    mtp = replace(mtp, num_future_tokens=N, target="trunk")
    check_losses_and_gradients(config, mtp)


def check_losses_and_gradients(config: Any, mtp: MTP) -> None:
    """Against whole logits of transformers' own modules, and autograd through them."""
    model = build(config, mtp)
    own, taught = reference(config, model), mtp.target == "trunk"
    batch = batch_of(from_head_1=taught)
    kind = mtp.target_loss if taught else None
    options = LossOptions(
        softcap=model.softcap, target_loss=kind, target_weight=mtp.target_weight, chunk_rows=5
    )
    out = ENGINES["head_by_head"](model, batch, SCALES, options, True)
    found = {name: p.grad for name, p in model.named_parameters()}

    heads = copy.deepcopy(model.mtp)
    heads.zero_grad()
    sums = naive_losses(own, heads, mtp, batch)
    torch.testing.assert_close(out.loss_sum.float(), torch.stack(sums), rtol=1e-5, atol=1e-5)
    (torch.stack(sums) * SCALES).sum().backward()
    frozen = mtp.train == "heads"
    wanted = {name: None if frozen else p.grad for name, p in own.named_parameters()}
    wanted |= {f"mtp.{name}": p.grad for name, p in heads.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        if grad is None:  # frozen, or an expert that no token chose
            assert found[name] is None or not (frozen or found[name].any()), name
        else:
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_a_forward_is_not_random() -> None:
    """Dropout and routers' noise are of transformers' training mode, which is never entered."""
    config = CONFIGS["mixtral"]()
    config.attention_dropout, config.router_jitter_noise = 0.5, 0.5
    model = build(config, MTP(heads="parallel", num_future_tokens=N))
    model.train()
    batch = batch_of()
    with torch.no_grad():
        first, second = model(batch), model(batch)
        theirs = reference(config, model).eval()(input_ids=batch.tokens, use_cache=False).logits
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(model.output(first[0]), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_of_any_width(name: str) -> None:
    """Also where torch's grouped products would not take it."""
    config = CONFIGS[name]()
    setattr(config, "intermediate_size" if name == "gpt_oss" else "moe_intermediate_size", 6)
    check_losses_and_gradients(config, MTP(heads="parallel", num_future_tokens=N))
    assert build(CONFIGS[name]()).causal.config._experts_implementation == "grouped_mm"


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4, "num_layers": 2}
UNSERVED = {
    "Bamba": (BAMBA, "BambaForCausalLM: its layers return tuples, and heads, which are layers"),
    "FalconH1": (BAMBA | {"mamba_d_ssm": 64}, "FalconH1ForCausalLM: its layers return tuples"),
    "Falcon": ({}, "FalconForCausalLM: its layers return tuples"),
    "RecurrentGemma": ({"lru_width": 32}, "has normalizer beside its layers, which is not served"),
    "LongcatFlash": (LATENT, "= 2 in a list of 1; expected one attention a layer"),
    "Gemma4Text": ({"head_dim": 8}, "has not the sizes .* of one width: 'head_dim' is a per-layer"),
    "Mamba2": (None, "'mamba2' has not the sizes of a decoder"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_in_a_model_is_not_served(name: str) -> None:
    changes, expected = UNSERVED[name]
    make = getattr(transformers, f"{name}Config")
    config = make() if changes is None else make(**SMALL | changes)
    with pytest.raises(UserError, match=expected) as error:
        HFTrunk(config, sizes_of_config(config, SEQ, None))
    assert "\n" not in str(error.value)
