"""DeepseekV3ForCausalLM of transformers: imported, exported, and drafting with its MTP modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats_run import DEEPSEEK, PLAIN_QUERIES, SEQUENTIAL, YARN, write_run
from runs import config_of, train
from test_export import count_drafts, load, our_logits, tokens
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.inference import generate, load_for_inference

transformers = pytest.importorskip("transformers")
FORMAT = "deepseek_v3_hf"
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
LAYERS = 4  # one dense, three of experts


def their_config(**options):
    return transformers.DeepseekV3Config(
        **{
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_hidden_layers": LAYERS,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "max_position_embeddings": 256,
            **options,
        }
    )


def their_model(**options):
    """Random, with uneven norms, decided routers and biases that take part."""
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM._from_config(
        their_config(**options), attn_implementation="eager"
    ).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        else:
            outer = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            scale = 1.0 if name.endswith("gate.weight") else 0.08 if outer else 0.15
            parameter.copy_(scale * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))


@pytest.fixture(scope="module")
def theirs_of():
    """Models by options, made once."""
    made = {}

    def get(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = their_model(**options)
        return made[key]

    return get


CASES = {
    "compressed queries": {},
    "plain queries": {"q_lora_rank": None},
    "yarn": {"rope_parameters": SCALED, "norm_topk_prob": False, "n_shared_experts": 2},
    "tied": {"tie_word_embeddings": True, "n_group": 4, "topk_group": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_an_imported_model_computes_their_logits(tmp_path: Path, theirs_of, name) -> None:
    theirs = theirs_of(**CASES[name])
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    spec = import_checkpoint(tmp_path / "hf", tmp_path / "run", FORMAT)
    assert spec.num_modules == 0  # transformers saves no modules, whatever its config says
    ours, _, _ = load_for_inference(tmp_path / "run")
    ids = tokens(100, vocab=320)
    expected, found = theirs(ids).logits, our_logits(ours, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    loads = [moe.expert_bias for _, moe in ours.named_moe_layers()]
    assert len(loads) == LAYERS - 1 and all(bias.dtype == torch.float32 for bias in loads)


MODULE = {  # written out by hand, the names of released checkpoints
    "enorm": "enorm",
    "hnorm": "hnorm",
    "eh_proj": "eh_proj",
    "post_norm": "shared_head.norm",
}


def module_tensors(model, count: int) -> tuple[object, dict[str, Tensor]]:
    """Random modules for a model, and their tensors as a released checkpoint has them."""
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(1)
    mtp = MtpModel(model, count).eval()
    found = {}
    for k, layer in enumerate(mtp.layers):
        randomise(layer)
        prefix = f"model.layers.{LAYERS + k}"
        for name, tensor in layer.state_dict().items():
            part, _, rest = name.partition(".")
            if part in MODULE:
                found[f"{prefix}.{MODULE[part]}.{rest}"] = tensor
            elif rest == "mlp.experts.gate_up_proj":
                for e, both in enumerate(tensor):
                    gate, up = both.chunk(2)
                    found[f"{prefix}.mlp.experts.{e}.gate_proj.weight"] = gate
                    found[f"{prefix}.mlp.experts.{e}.up_proj.weight"] = up
            elif rest == "mlp.experts.down_proj":
                for e, down in enumerate(tensor):
                    found[f"{prefix}.mlp.experts.{e}.down_proj.weight"] = down
            else:
                found[f"{prefix}.{rest}"] = tensor
        # Copies of what is shared, which released checkpoints have.
        found[f"{prefix}.embed_tokens.weight"] = model.model.embed_tokens.weight
        found[f"{prefix}.shared_head.head.weight"] = model.lm_head.weight
    return mtp, {name: tensor.detach().clone() for name, tensor in found.items()}


def save_with_modules(model, folder: Path, count: int):
    model.save_pretrained(folder)
    mtp, further = module_tensors(model, count)
    file = folder / "model.safetensors"
    save_file(load_file(file) | further, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}))
    return mtp


def module_states(mtp, config, h: Tensor, ids: Tensor, size: int, count: int) -> list[Tensor]:
    """Hidden states of modules 1.. over `size` positions, each fed with the tokens that it sees."""
    from transformers.cache_utils import MtpCache

    cache, at, states = MtpCache(config=config.get_mtp_config()), torch.arange(size)[None], []
    for k in range(count):
        h = mtp.forward_layer(k, h, at, cache, input_ids=ids[:, k + 1 : k + 1 + size])
        states.append(h)
    return states


def our_states(model, ids: Tensor, size: int) -> list[Tensor]:
    n = model.mtp.num_future_tokens
    at = torch.arange(size).unsqueeze(0)
    future = torch.stack([ids[:, k : k + size] for k in range(1, n)], -1)
    return model(Batch(ids[:, :size], future, torch.empty(0), at, torch.zeros_like(at)))


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, 1),
        (CASES["yarn"], 2),
        pytest.param({}, 2, marks=pytest.mark.exhaustive),
        pytest.param(CASES["yarn"], 1, marks=pytest.mark.exhaustive),
    ],
    ids=["plain-1", "yarn-2", "plain-2", "yarn-1"],
)
def test_an_imported_module_gives_their_draft_logits(tmp_path, theirs_of, modules, options):
    theirs = theirs_of(num_mtp_layers=2, **options)
    mtp = save_with_modules(theirs, tmp_path / "hf", modules)
    spec = import_checkpoint(tmp_path / "hf", tmp_path / "run", FORMAT)
    assert (spec.heads, spec.num_future_tokens) == ("sequential", modules + 1)
    ours, _, _ = load_for_inference(tmp_path / "run")
    ids, size = tokens(40, vocab=320), 40 - modules
    last = theirs(ids[:, :size], output_hidden_states=True).hidden_states[-1]
    expected = module_states(mtp, theirs.config, last, ids, size, modules)
    found = our_states(ours, ids, size)
    torch.testing.assert_close(ours.output(found[0]), theirs.lm_head(last), rtol=0, atol=2e-5)
    for a, b in zip(found[1:], expected, strict=True):
        logits = theirs.lm_head(b)
        assert logits.std() > 0.1
        torch.testing.assert_close(ours.output(a), logits, rtol=0, atol=2e-5)

    # And back: every tensor of theirs but the copies, to the bit.
    export_checkpoint(tmp_path / "run", tmp_path / "again", FORMAT)
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    copies = {name for name in before if name.endswith(("embed_tokens.weight", "head.weight"))}
    copies -= {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(copies) == 2 * modules and after.keys() == before.keys() - copies
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert after["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def know_modules(monkeypatch, layers: int, count: int) -> None:
    """The line of docs/serving.md: transformers knows the layers of released models only."""
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [rf"model\.layers\.{layers + k}\." for k in range(count)],
    )


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        (DEEPSEEK, 1),
        (DEEPSEEK | PLAIN_QUERIES | YARN, 2),
        pytest.param(DEEPSEEK, 2, marks=pytest.mark.exhaustive),
        pytest.param(DEEPSEEK | PLAIN_QUERIES | YARN, 1, marks=pytest.mark.exhaustive),
    ],
    ids=["a-1", "b-2", "a-2", "b-1"],
)
def test_transformers_runs_our_model_and_drafts_with_it(tmp_path, monkeypatch, changes, modules):
    from transformers.modeling_layers import MtpModel

    ours, _ = write_run(
        tmp_path / "run", **changes | SEQUENTIAL | {"mtp.num_future_tokens": modules + 1}
    )
    export_checkpoint(tmp_path / "run", tmp_path / "hf", FORMAT, max_shard_size=100_000)
    know_modules(monkeypatch, LAYERS, modules)
    theirs, info = load(tmp_path / "hf")
    assert not info["unexpected_keys"] and theirs.dtype == torch.float32
    ids, size = tokens(40), 40 - modules
    states = our_states(ours, ids, size)
    expected, found = ours.output(states[0]), theirs(ids[:, :size]).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    last = theirs(ids[:, :size], output_hidden_states=True).hidden_states[-1]
    drafting = MtpModel.from_pretrained(theirs)
    further = module_states(drafting, theirs.config, last, ids, size, modules)
    for a, b in zip(further, states[1:], strict=True):
        torch.testing.assert_close(theirs.lm_head(a), ours.output(b), rtol=0, atol=1e-5)

    prompt, sizes = tokens(12), count_drafts(theirs)
    found = theirs.generate(
        prompt, max_new_tokens=24, do_sample=False, use_mtp=True, eos_token_id=None
    )
    run, *_ = load_for_inference(tmp_path / "run")
    again, *_ = load_for_inference(tmp_path / "hf")
    for model in (run, again):
        text = generate(model, [prompt[0].tolist()], 24, speculative=True).tokens[0]
        assert found[0, 12:].tolist() == text
    assert max(sizes[1:]) == modules + 1  # it did draft


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek's weights: blocks of 128 x 128, each scaled to the range of e4m3, 448."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales, out = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[at].abs().max() / 448
            out[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


def test_weights_in_fp8_are_imported(tmp_path: Path, theirs_of) -> None:
    """Blocks at the edges are smaller than 128; embedding, norms and routers are not quantised."""
    theirs = theirs_of(hidden_size=144, intermediate_size=200, moe_intermediate_size=24)
    theirs.save_pretrained(tmp_path / "hf")
    file, config_file = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    whole = load_file(file)
    stored, steps = {}, {}
    for name, tensor in whole.items():
        if "_proj" in name and tensor.ndim == 2:
            stored[name], stored[f"{name}_scale_inv"] = quantize(tensor)
            # e4m3 has 3 bits after the point: half a step is 1/16 of a value, and no less than
            # half of the smallest step, 2^-9, in units of the scale.
            scale = stored[f"{name}_scale_inv"].max()
            steps[name] = tensor.abs() / 16 + scale * 2**-10
        else:
            stored[name] = tensor.bfloat16() if tensor.ndim > 1 else tensor
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config_file.write_text(json.dumps(config))
    assert len(steps) > 30

    spec = import_checkpoint(tmp_path / "hf", tmp_path / "run", FORMAT, dtype=torch.float32)
    export_checkpoint(tmp_path / "run", tmp_path / "back", FORMAT)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == whole.keys() and spec.num_modules == 0
    for name, tensor in back.items():
        if name in steps:
            assert ((tensor - whole[name]).abs() <= steps[name] * 1.0001).all(), name
            block = stored[name][:128, :128].float() * stored[f"{name}_scale_inv"][0, 0]
            assert torch.equal(tensor[:128, :128], block), name  # the very products
    # Without a type, as DeepSeek's own conversion: bfloat16.
    import_checkpoint(tmp_path / "hf", tmp_path / "bf16", FORMAT)
    model, _, _ = load_for_inference(tmp_path / "bf16")
    assert torch.equal(
        model.layers["0"].attention.wo.weight,
        back["model.layers.0.self_attn.o_proj.weight"].bfloat16().float(),
    )


def test_a_run_starts_from_and_leaves_such_a_folder(tmp_path: Path, theirs_of) -> None:
    theirs = theirs_of(num_mtp_layers=2)
    save_with_modules(theirs, tmp_path / "hf", 1)
    import_checkpoint(tmp_path / "hf", tmp_path / "run", FORMAT)
    changes = {
        "model.name": "deepseek_v3",
        "model.vocab_size": 320,
        "model.flavor": "custom",
        "model.args.dim": 32,
        "model.args.n_layers": LAYERS,
        "model.args.n_heads": 4,
        "model.args.hidden_dim": 56,
        "model.args.latent.q_lora_rank": 20,
        "model.args.latent.kv_lora_rank": 16,
        "model.args.latent.qk_nope_head_dim": 12,
        "model.args.latent.qk_rope_head_dim": 8,
        "model.args.latent.v_head_dim": 10,
        "model.args.moe.num_experts": 8,
        "model.args.moe.hidden_dim": 24,
        "model.args.moe.top_k": 3,
        "model.args.moe.num_expert_groups": 2,
        "model.args.moe.num_limited_groups": 1,
        "model.args.moe.route_scale": 2.5,
        "model.args.moe.load_balance_coeff": 0.01,
        "mtp.heads": "sequential",
        "mtp.num_future_tokens": 2,
        "checkpoint.enable": True,
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_path": str(tmp_path / "hf"),
        "checkpoint.last_save_in_hf": True,
        "training.steps": 1,
        "optimizer.lr": 1e-12,
        "lr_scheduler.warmup_steps": 0,
    }
    run = train(config_of(tmp_path / "a", changes))
    before, _, _ = load_for_inference(tmp_path / "run")
    after = load_file(next((tmp_path / "a").rglob("step-1.hf")) / "model.safetensors")
    for name, tensor in before.state_dict().items():
        if name.endswith("expert_bias"):  # one step of balance
            assert 0.005 < (run.weights[name] - tensor).abs().max() < 0.02
        else:
            torch.testing.assert_close(run.weights[name], tensor, rtol=0, atol=1e-9)
    assert torch.equal(
        after[f"model.layers.{LAYERS}.eh_proj.weight"], run.weights["mtp.heads.0.eh_proj.weight"]
    )


def test_what_no_folder_holds_is_refused_before_the_training(tmp_path: Path) -> None:
    keys = {
        "checkpoint.enable": True,
        "checkpoint.last_save_in_hf": True,
        "mtp.heads": "sequential",
    }
    softmax = {"model.name": "deepseek_v3", "model.args.moe.score_func": "softmax"}
    experts = {"model.args.moe.num_experts": 4}  # in a Llama
    for changes, message in ((softmax, "takes sigmoids"), (experts, "no Hugging Face format")):
        with pytest.raises(UserError, match=message):
            train(config_of(tmp_path, keys, changes))
        assert not (tmp_path / "run" / "config.toml").exists()
