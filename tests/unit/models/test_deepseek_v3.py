"""DeepSeek's models by the numbers that DeepSeek publishes."""

from __future__ import annotations

import pytest

from torchtitan_mtp.config import MTP
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads


def model_of(flavor: str) -> Transformer:
    """With one MTP module, on the meta device."""
    model = build_model(model_args("deepseek_v3", flavor, tokenizer_vocab=256))
    return add_heads(model, MTP(heads="sequential", num_future_tokens=2))


def count(model: Transformer, prefix: str = "", active: bool = False) -> int:
    """Parameters under a name; `active`: those that one token multiplies with."""
    moe = model.args.moe
    total = 0
    for name, p in model.named_parameters():
        routed = ".moe.experts." in name
        share = p.numel() * moe.top_k // moe.num_experts if active and routed else p.numel()
        total += share if name.startswith(prefix) else 0
    return total


def test_671b_has_the_published_sizes():
    """The README and README_WEIGHTS.md of deepseek-ai/DeepSeek-V3; 685B files on Hugging Face."""
    model = model_of("671B")
    shared = model.tok_embeddings.weight.numel()  # and as many in `output`
    assert round(shared / 1e9, 1) == 0.9
    trunk, module = count(model) - count(model, "mtp."), count(model, "mtp.")
    assert trunk == 671_026_404_352
    assert round(module / 1e9, 1) == 11.6
    # With the embedding and the unembedding that its file repeats, 14 in DeepSeek's words.
    assert 13.4e9 < module + 2 * shared < 14e9
    file = trunk + module + 2 * shared
    assert round((file + file / 128**2) / 1e9) == 685  # a scale for each block of 128 x 128
    used = count(model, active=True) - count(model, "mtp.", active=True)
    assert round((used - shared) / 1e9) == 37  # the embedding is looked up, not multiplied with


def test_16b_has_the_published_sizes():
    """DeepSeek-V2, appendix B: V2-Lite has 15.7B parameters, 2.4B of them for each token."""
    model = model_of("16B")
    trunk = count(model) - count(model, "mtp.")
    assert round(trunk / 1e9, 1) == 15.7
    used = count(model, active=True) - count(model, "mtp.", active=True)
    assert 2.4e9 < used - model.tok_embeddings.weight.numel() < 2.5e9


@pytest.mark.parametrize(("flavor", "dense"), [("671B", 3), ("16B", 1), ("debugmodel", 1)])
def test_first_blocks_are_dense_and_modules_are_as_the_last(flavor, dense):
    model = model_of(flavor)
    kinds = ["moe" if block.moe else "dense" for block in model.layers.values()]
    assert kinds == ["dense"] * dense + ["moe"] * (model.args.n_layers - dense)
    assert model.mtp.heads[0].block.moe is not None
    names = [name for name, _ in model.named_moe_layers()]
    assert names == [f"layers.{i}" for i in range(dense, model.args.n_layers)] + ["mtp.heads.0"]


def test_names_are_torchtitans():
    """Of deepseek_v3 in its release 0.2.2, a dense block and one of experts."""
    model = build_model(model_args("deepseek_v3", "671B", tokenizer_vocab=256))
    queries, keys = ["wq_a", "q_norm", "wq_b"], ["wkv_a", "kv_norm", "wkv_b", "wo"]
    expected = [f"attention.{part}.weight" for part in (*queries, *keys)]
    expected += ["attention_norm.weight", "ffn_norm.weight"]
    dense = [f"feed_forward.w{i}.weight" for i in (1, 2, 3)]
    mixture = [f"moe.experts.w{i}" for i in (1, 2, 3)] + ["moe.router.gate.weight"]
    mixture += [f"moe.shared_experts.w{i}.weight" for i in (1, 2, 3)] + ["moe.expert_bias"]
    state = model.state_dict()
    for i, feed_forward in ((0, dense), (3, mixture)):
        found = {name.split(".", 2)[2] for name in state if name.startswith(f"layers.{i}.")}
        assert found == {*expected, *feed_forward}
    assert state["layers.3.moe.experts.w1"].shape == (256, 2048, 7168)
    assert state["layers.3.moe.experts.w2"].shape == (256, 7168, 2048)
    assert state["layers.3.moe.expert_bias"].shape == (256,)
    plain = build_model(model_args("deepseek_v3", "16B", tokenizer_vocab=256)).state_dict()
    assert plain["layers.0.attention.wq.weight"].shape == (16 * 192, 2048)
    assert "layers.0.attention.wq_a.weight" not in plain
