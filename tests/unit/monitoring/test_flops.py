"""FLOPs by formula against FLOPs counted while a naive model runs."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_models import CONFIGS
from torchtitan_mtp.config.sections.mtp import MTP
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.args import LatentArgs, ModelArgs, MoEArgs
from torchtitan_mtp.models.hf import HFTrunk
from torchtitan_mtp.models.hf_config import sizes_of_config
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.monitoring.flops import cost_in_layers, forward_backward_flops_per_token
from torchtitan_mtp.mtp.transform import add_heads

B, S, V, D, LAYERS = 2, 16, 48, 32, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only wait for further threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DENSE = ModelArgs(
    dim=D, n_layers=LAYERS, n_heads=4, n_kv_heads=2, vocab_size=V, multiple_of=16, max_seq_len=S
)
EXPERTS = replace(
    DENSE,
    latent=LatentArgs(
        q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6
    ),
    moe=MoEArgs(num_experts=4, hidden_dim=16, top_k=2, num_shared_experts=2),
)


def build(mtp: MTP, args: ModelArgs = DENSE) -> Transformer:
    return add_heads(Transformer(args), mtp)


def grouped_product_flops(a, b, ends, *args, **kwargs) -> int:
    """Rows a [R, in], matrices b [G, out, in]; or rows a [R, out], rows b [R, in]: 2 R in out."""
    return 2 * math.prod(a) * b[1]


GROUPED = {
    torch.ops.torchtitan_mtp.grouped_linear: grouped_product_flops,
    torch.ops.torchtitan_mtp.grouped_outer: grouped_product_flops,
}


def counted_flops_per_token(model: Transformer, n: int, taught: bool = False) -> float:
    """One naive step under PyTorch's counter, which counts the products that really run."""
    batch = Batch(
        tokens=torch.zeros(B, S, dtype=torch.long),
        future_tokens=torch.zeros(B, S, n - 1, dtype=torch.long),
        labels=torch.zeros(B, S, n, dtype=torch.long),
        positions=torch.arange(S).expand(B, S),
        doc_ids=torch.zeros(B, S, dtype=torch.long),
    )
    detached = model.mtp is not None and model.mtp.detach_trunk
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = torch.zeros(())
        hiddens = model(batch)
        for k, h in enumerate(hiddens):
            if taught and k:
                F.linear(hiddens[0].detach(), model.output.weight.detach())
            weight = model.output.weight.detach() if detached and k else model.output.weight
            loss = loss + F.cross_entropy(
                F.linear(h, weight).flatten(0, 1), batch.labels[..., k].flatten()
            )
        loss.backward()
    return counter.get_total_flops() / (B * S)


@pytest.mark.parametrize("args", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "mtp",
    [
        MTP(num_future_tokens=1),
        MTP(num_future_tokens=4),
        MTP(num_future_tokens=3, heads="sequential"),
        MTP(num_future_tokens=4, heads="sequential", share_weights=True),
        MTP(num_future_tokens=3, match_parameters=True),
        MTP(num_future_tokens=3, train="heads"),
        MTP(num_future_tokens=3, heads="sequential", train="heads"),
        MTP(num_future_tokens=3, detach_trunk=True),
        MTP(num_future_tokens=3, train="trunk"),
        MTP(num_future_tokens=3, heads="sequential", train="trunk"),
        MTP(num_future_tokens=3, target="trunk"),
        MTP(num_future_tokens=3, heads="sequential", share_weights=True, target="trunk"),
        MTP(num_future_tokens=3, train="heads", target="trunk"),
    ],
    ids=lambda m: "-".join(
        str(getattr(m, key))
        for key in (
            "heads",
            "num_future_tokens",
            "train",
            "share_weights",
            "detach_trunk",
            "target",
        )
    ),
)
def test_formula_equals_the_flop_counter(mtp: MTP, args: ModelArgs) -> None:
    with torch.device("meta"):
        model = build(mtp, args)
    model.to_empty(device="cpu").init_buffers()
    # The counter sees unmasked attention, S keys for every query, where the formula has S / 2.
    taught = mtp.target == "trunk"
    expected = forward_backward_flops_per_token(model, 2 * S, taught)
    assert counted_flops_per_token(model, mtp.num_future_tokens, taught) == expected


def block_params() -> int:
    """wq, wo; wk, wv of half the heads; w1..3."""
    ffn = build(MTP(num_future_tokens=1)).layers["0"].feed_forward.w1.out_features
    return 2 * D * D + 2 * D * (D // 2) + 3 * D * ffn


def test_plain_model_is_six_per_parameter_and_causal_attention() -> None:
    found = forward_backward_flops_per_token(build(MTP(num_future_tokens=1)), 128)
    assert found == 6 * (LAYERS * block_params() + D * V) + 6 * 128 * LAYERS * D


def test_a_chain_by_hand() -> None:
    found = forward_backward_flops_per_token(build(MTP(num_future_tokens=3, heads="sequential")), S)
    params = LAYERS * block_params() + 2 * (block_params() + 2 * D * D)
    assert found == 6 * (params + 3 * D * V) + 6 * S * (LAYERS + 2) * D


def test_output_multiplies_once_per_head() -> None:
    one, three = (
        forward_backward_flops_per_token(build(MTP(num_future_tokens=n, match_parameters=True)), 8)
        for n in (1, 3)
    )
    assert three - one == 6 * 2 * D * V


def test_heads_in_layers_by_hand() -> None:
    """Of a chain: two modules, each with a projection beside its layer, and `output` three times,
    over a layer."""
    model = build(MTP(num_future_tokens=3, heads="sequential"))
    layer = block_params() + S * D
    cost = cost_in_layers(model, S, forward_backward_flops_per_token(model, S))
    assert cost == pytest.approx((2 * (layer + 2 * D * D) + 3 * D * V) / layer)


def test_a_model_on_the_meta_device_counts_the_same() -> None:
    with torch.device("meta"):
        meta = build(MTP(num_future_tokens=4))
    whole = build(MTP(num_future_tokens=4))
    assert forward_backward_flops_per_token(meta, S) == forward_backward_flops_per_token(whole, S)


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_a_trunk_of_transformers_counts_as_the_same_model_here(family: str, heads: str) -> None:
    config = CONFIGS[family]()
    args = ModelArgs(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=64, hidden_dim=48, qk_norm=False
    )
    if family == "deepseek_v3":
        latent = LatentArgs(16, 16, 8, 4, 8)
        moe = MoEArgs(num_experts=4, hidden_dim=16, top_k=2, num_shared_experts=1)
        args = replace(args, latent=latent, moe=moe)
    mtp = MTP(heads=heads, num_future_tokens=3)
    own = HFTrunk(config, sizes_of_config(config, S, "causal"))
    counts = [
        forward_backward_flops_per_token(add_heads(model, mtp), S)
        for model in (own, Transformer(args))
    ]
    assert counts[0] == counts[1]
