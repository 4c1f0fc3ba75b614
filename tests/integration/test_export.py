"""Exported models in transformers, and transformers' models imported: the same numbers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from formats_run import LLAMA_3_1, QWEN, QWEN2, RAW, SEQUENTIAL, SMALL, weights, write_run
from runs import TINY, a_world, config_of, same, train, weights_of
from torchtitan_mtp.cli.export_checkpoint import main as export_command
from torchtitan_mtp.cli.generate import main as generate_command
from torchtitan_mtp.cli.import_checkpoint import main as import_command
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.inference import generate, load_for_inference
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.trainer import Trainer

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]

QUICKSTART = {"model.flavor": "quickstart", "training.seq_len": 128}
TIED = {"model.args.tied_embeddings": True}
WIDE = {"model.args.head_size": 12}


def tokens(count: int = 48, vocab: int = 256, seed: int = 0) -> Tensor:
    """Random tokens [1, count]."""
    return torch.randint(0, vocab, (1, count), generator=torch.Generator().manual_seed(seed))


def our_logits(model: Transformer, ids: Tensor) -> Tensor:
    """Head 1's [1, S, V]."""
    at = torch.arange(ids.shape[1]).unsqueeze(0)
    further = 0 if model.mtp is None else model.mtp.num_future_tokens - 1
    future = ids.new_zeros(*ids.shape, further)
    batch = Batch(ids, future, torch.empty(0), at, torch.zeros_like(at))
    return model.output(model(batch)[0])


def load(folder: Path, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval(), info


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("llama_hf", QUICKSTART, marks=pytest.mark.exhaustive),
        ("llama_hf", SMALL | LLAMA_3_1 | TIED),
        ("llama_hf", SMALL | WIDE),
        pytest.param("qwen2_hf", QWEN2, marks=pytest.mark.exhaustive),
        ("qwen2_hf", QWEN2 | LLAMA_3_1 | TIED),
        ("qwen3_hf", QWEN),
        pytest.param("qwen3_hf", QWEN | TIED, marks=pytest.mark.exhaustive),
        ("glm4_moe_hf", QUICKSTART | SEQUENTIAL),
        pytest.param("glm4_moe_hf", SMALL | LLAMA_3_1 | SEQUENTIAL, marks=pytest.mark.exhaustive),
        ("glm4_moe_hf", QWEN | TIED | SEQUENTIAL),
        ("glm4_moe_hf", QWEN2 | SEQUENTIAL),
        ("mimo_hf", QWEN2 | RAW),
        ("mellum_hf", QWEN | LLAMA_3_1 | SEQUENTIAL | {"mtp.num_future_tokens": 2}),
    ],
)
def test_transformers_computes_our_logits(tmp_path: Path, name: str, changes) -> None:
    ours, _ = write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", name, max_shard_size=100_000)
    theirs, info = load(tmp_path / "hf")
    # Modules behind the trunk are not loaded with it: `use_mtp` reads them.
    layers = ours.args.n_layers
    behind = (f"layers.{layers}.", f"layers.{layers + 1}.", "mtp.", "mtp_layers.")
    assert all(k.removeprefix("model.").startswith(behind) for k in info["unexpected_keys"])
    ids = tokens()
    assert theirs.dtype == torch.float32
    expected, found = our_logits(ours, ids), theirs(ids).logits
    assert expected.std() > 0.1  # not the agreement of zeros
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def count_drafts(model) -> list[int]:
    """Collects the size of every forward of the whole model."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, options: sizes.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        (QUICKSTART, 1),
        (QWEN, 2),
        pytest.param(QUICKSTART, 2, marks=pytest.mark.exhaustive),
        pytest.param(QWEN, 1, marks=pytest.mark.exhaustive),
    ],
    ids=["llama-1", "qwen3-2", "llama-2", "qwen3-1"],
)
def test_transformers_drafts_with_our_modules(tmp_path: Path, monkeypatch, changes, modules):
    changes = changes | SEQUENTIAL | {"mtp.num_future_tokens": modules + 1}
    ours, _ = write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "glm4_moe_hf")
    layers = ours.args.n_layers
    # The line of docs/serving.md: transformers knows the layers of released models only.
    monkeypatch.setattr(
        transformers.Glm4MoeForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [rf"model\.layers\.{layers + k}\." for k in range(modules)],
    )
    theirs, info = load(tmp_path / "hf")
    assert not info["unexpected_keys"]
    prompt = tokens(12)
    sizes = count_drafts(theirs)
    found = theirs.generate(
        prompt, max_new_tokens=24, do_sample=False, use_mtp=True, eos_token_id=None
    )
    run, *_ = load_for_inference(tmp_path / "run")
    expected = generate(run, [prompt[0].tolist()], 24).tokens[0]
    assert found[0, 12:].tolist() == expected
    assert max(sizes[1:]) == modules + 1  # it did draft


@pytest.mark.parametrize("modules", [1, 2])
def test_transformers_modules_compute_our_heads(tmp_path: Path, monkeypatch, modules) -> None:
    """The drafts themselves: a wrong module would only cost acceptance, never a token."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    changes = QUICKSTART | SEQUENTIAL | {"mtp.num_future_tokens": modules + 1}
    ours, _ = write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "glm4_moe_hf")
    layers = ours.args.n_layers
    monkeypatch.setattr(
        transformers.Glm4MoeForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [rf"model\.layers\.{layers + k}\." for k in range(modules)],
    )
    theirs, _ = load(tmp_path / "hf")
    ids = tokens(21)
    size = 21 - modules
    at = torch.arange(size).unsqueeze(0)
    future = torch.stack([ids[:, k : k + size] for k in range(1, modules + 1)], -1)
    hiddens = ours(Batch(ids[:, :size], future, torch.empty(0), at, torch.zeros_like(at)))
    module = MtpModel.from_pretrained(theirs)
    cache = MtpCache(config=theirs.config.get_mtp_config())
    h = theirs(ids[:, :size], output_hidden_states=True).hidden_states[-1]
    for k in range(modules):
        inputs = ids[:, k + 1 : k + 1 + size]
        h = module.forward_layer(k, h, at, cache, input_ids=inputs)
        torch.testing.assert_close(h, hiddens[k + 1], rtol=0, atol=2e-5)


def test_the_first_module_alone(tmp_path: Path, capsys) -> None:
    """For engines that stop at a second one, or have no use for it."""
    write_run(tmp_path / "run", **QWEN, **SEQUENTIAL)
    export_checkpoint(tmp_path / "run", tmp_path / "both", "glm4_moe_hf")
    arguments = [str(tmp_path / "run"), str(tmp_path / "one"), "--format", "glm4_moe_hf"]
    assert export_command([*arguments, "--modules", "1"]) == 0
    assert "1 sequential heads" in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(tmp_path / "one")
    assert config.num_nextn_predict_layers == 1
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "both"))
    second = {key for key in both if key.startswith("model.layers.4.")}
    assert second and same(one, {key: t for key, t in both.items() if key not in second})
    # A format that holds one module alone takes the first.
    export_checkpoint(tmp_path / "run", tmp_path / "mellum", "mellum_hf", modules=1)
    mellum = load_file(tmp_path / "mellum" / "model.safetensors")
    assert any(key.startswith("mtp.") for key in mellum)
    for modules in ("0", "3"):
        assert export_command([*arguments, "--modules", modules]) == 1
        assert f"--modules {modules}: the model has 2; give 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="write the first with --modules 1, or leave them out"):
        export_checkpoint(tmp_path / "run", tmp_path / "x", "mellum_hf")


class MiMoModule(torch.nn.Module):
    """`MiMoMultiTokenPredictorLayer` of vLLM's mimo_mtp.py around transformers' Qwen2 layer, but
    for the embedding at position 0, which vLLM takes for zero."""

    def __init__(self, config) -> None:
        super().__init__()
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

        width = config.hidden_size
        self.token_layernorm = Qwen2RMSNorm(width, eps=config.rms_norm_eps)
        self.hidden_layernorm = Qwen2RMSNorm(width, eps=config.rms_norm_eps)
        self.input_proj = torch.nn.Linear(2 * width, width, bias=False)
        self.mtp_block = Qwen2DecoderLayer(config, layer_idx=0)
        self.final_layernorm = Qwen2RMSNorm(width, eps=config.rms_norm_eps)

    def load(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """As vLLM names them: all but four belong to the block."""
        own = {name for name, _ in self.named_children()}
        state = {}
        for key in (key for key in tensors if key.startswith(prefix)):
            name = key.removeprefix(prefix)
            state[name if name.split(".")[0] in own else f"mtp_block.{name}"] = tensors[key]
        self.load_state_dict(state)

    def forward(self, hidden: Tensor, embedded: Tensor, **options) -> Tensor:
        joined = torch.cat((self.hidden_layernorm(hidden), self.token_layernorm(embedded)), -1)
        return self.final_layernorm(self.mtp_block(self.input_proj(joined), **options))


@pytest.mark.parametrize("modules", [1, 2])
def test_mimos_modules_compute_our_heads(tmp_path: Path, modules: int) -> None:
    from transformers.masking_utils import create_causal_mask

    changes = QWEN2 | RAW | {"mtp.num_future_tokens": modules + 1}
    ours, _ = write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "mimo_hf")
    theirs, _ = load(tmp_path / "hf")
    assert theirs.config.num_nextn_predict_layers == modules
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    ids = tokens(24 + modules)
    size = 24
    at = torch.arange(size).unsqueeze(0)
    # vLLM's MiMoModel.forward ends before the final norm, which compute_logits applies.
    raw: list[Tensor] = []
    theirs.model.norm.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
    theirs(ids[:, :size])
    mask = create_causal_mask(
        config=theirs.config,
        inputs_embeds=raw[0],
        attention_mask=None,
        past_key_values=None,
        position_ids=at,
    )
    rotary = theirs.model.rotary_emb(raw[0], at)

    future = torch.stack([ids[:, k : k + size] for k in range(1, modules + 1)], dim=-1)
    hiddens = ours(Batch(ids[:, :size], future, torch.empty(0), at, torch.zeros_like(at)))
    h = raw[0]
    for k in range(2, modules + 2):
        ahead = ids[:, k - 1 : k - 1 + size]
        module = MiMoModule(theirs.config).eval()
        module.load(tensors, f"model.mtp_layers.{k - 2}.")
        h = module(
            h, theirs.model.embed_tokens(ahead), attention_mask=mask, position_embeddings=rotary
        )
        found, expected = theirs.lm_head(h), ours.output(hiddens[k - 1])
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama_config(**options):
    return transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, **options)


def qwen2_config(**options):
    return transformers.Qwen2Config(**SHAPE, **options)


def qwen3_config(**options):
    return transformers.Qwen3Config(**SHAPE, head_dim=16, **options)


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama_hf", llama_config()),
        ("llama_hf", llama_config(rope_parameters=SCALED, tie_word_embeddings=True)),
        ("qwen2_hf", qwen2_config()),
        ("qwen3_hf", qwen3_config()),
    ],
    ids=["llama", "llama-scaled-tied", "qwen2", "qwen3"],
)
def test_an_imported_model_has_the_loss_that_transformers_computes(tmp_path, name, config):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    import_checkpoint(tmp_path / "hf", tmp_path / "run", name)
    ours, _, _ = load_for_inference(tmp_path / "run")
    ids = tokens(100, vocab=320)
    expected = theirs(ids, labels=ids).loss
    found = F.cross_entropy(our_logits(ours, ids)[0, :-1], ids[0, 1:])
    assert abs(found.item() - expected.item()) < 1e-4
    torch.testing.assert_close(our_logits(ours, ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_the_byte_tokenizer_goes_along(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **SMALL)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "llama_hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def f(x):\n    return x  # naïve 日本 \x00\t<|end_of_text|"
    assert theirs(text, add_special_tokens=False).input_ids == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)
    import_checkpoint(tmp_path / "hf", tmp_path / "back", "llama_hf")
    _, ours, _ = load_for_inference(tmp_path / "back")
    assert ours.encode(text).tolist() == list(text.encode()) and ours.eos_id == 257


def test_the_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """One by its script; tests/unit/cli has the other scripts' calls."""
    write_run(tmp_path / "run", **SMALL, **SEQUENTIAL)
    name = ["--format", "glm4_moe_hf"]
    arguments = [*name, "--max_shard_size", "100KB", "--dtype", "bfloat16"]
    script = str(ROOT / "scripts" / "export_checkpoint.py")
    monkeypatch.setattr(
        "sys.argv", [script, str(tmp_path / "run"), str(tmp_path / "hf"), *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert not ended.value.code and "2 sequential heads" in capsys.readouterr().out
    assert import_command([str(tmp_path / "hf"), str(tmp_path / "back"), *name]) == 0
    decode = "--prompt", "def", "--max_new_tokens", "8", "--compare"
    assert generate_command([str(tmp_path / "back"), *decode]) == 0
    capsys.readouterr()
    wrong = [str(tmp_path / "run"), str(tmp_path / "x"), "--format", "llama_hf"]
    assert export_command([*wrong, "--from", "a"]) == 1
    assert "--from a: goes with --format same" in capsys.readouterr().err
    assert export_command([*wrong[:-1], "lama_hf"]) == 1
    errors = capsys.readouterr().err
    assert errors.endswith("did you mean llama_hf?\n") and "Traceback" not in errors
    assert export_command([*wrong[:2], *name, "--max_shard_size", "9" * 5000]) == 1
    assert capsys.readouterr().err.endswith("99: expected a size such as 5GB or 500MB\n")


def start(folder: Path, source: Path, **changes) -> tuple[dict[str, Tensor], Trainer]:
    """The weights with which a run starts from a Hugging Face folder."""
    options = {"checkpoint.enable": True, "checkpoint.initial_load_in_hf": True}
    options["checkpoint.initial_load_path"] = str(source)
    trainer = Trainer(config_of(folder, {"model.vocab_size": 320, **options}, changes))
    started = weights_of(trainer)
    trainer.close()
    return started, trainer


def test_a_run_starts_from_a_hugging_face_folder(tmp_path: Path) -> None:
    changes = {"model.vocab_size": 320, "training.seq_len": 32, "model.flavor": "custom"}
    changes |= {"model.args.dim": 32, "model.args.n_layers": 2, "model.args.n_heads": 4}
    changes |= {"model.args.n_kv_heads": 2, "model.args.hidden_dim": TINY.ffn_dim}
    saved, _ = write_run(tmp_path / "saved", **changes)
    export_checkpoint(tmp_path / "saved", tmp_path / "hf", "llama_hf")
    started, trainer = start(tmp_path / "a", tmp_path / "hf", **{"mtp.init": "copy_last_layer"})
    assert all(torch.equal(started[name], t) for name, t in saved.state_dict().items())
    # Heads are not in the folder: each starts as the layer that was loaded.
    name = "attention.wq.weight"
    for k in range(2):
        assert torch.equal(started[f"mtp.heads.{k}.{name}"], saved.layers["1"].attention.wq.weight)
    missing = {".".join(key.split(".")[:3]) for key in trainer.checkpointer.load_report.missing}
    assert missing == {"mtp.heads.0", "mtp.heads.1"}

    with pytest.raises(UserError, match=r"rope_theta = 500\.0, not 10000\.0 as"):
        start(tmp_path / "b", tmp_path / "hf", **{"model.args.rope_theta": 500.0})
    with pytest.raises(UserError, match=r"config\.json: missing"):
        start(tmp_path / "c", tmp_path / "saved")


def test_modules_that_read_another_state_are_not_loaded(tmp_path: Path) -> None:
    shape = QWEN2 | {"training.seq_len": 32}
    saved, _ = write_run(tmp_path / "saved", **shape, **RAW)
    export_checkpoint(tmp_path / "saved", tmp_path / "hf", "mimo_hf")
    keys = shape | {"mtp.heads": "sequential", "mtp.num_future_tokens": 3}
    with pytest.raises(UserError, match=r'mtp.trunk_state = "raw", this run has "normalized"'):
        start(tmp_path / "a", tmp_path / "hf", **keys)
    keys |= {"checkpoint.exclude_from_loading": ["mtp"]}
    started, _ = start(tmp_path / "b", tmp_path / "hf", **keys)
    trunk = [name for name in started if not name.startswith("mtp.")]
    assert all(torch.equal(started[name], saved.state_dict()[name]) for name in trunk)


@pytest.fixture(scope="module")
def trained_trunk(tmp_path_factory) -> tuple[dict[str, Tensor], Path]:
    """A plain model's weights, and the Hugging Face folder that its run left."""
    folder: Path = tmp_path_factory.mktemp("trunk")
    plain = {"model.converters": [], "mtp.num_future_tokens": 1, "training.steps": 80}
    saves = {"checkpoint.enable": True, "checkpoint.last_save_in_hf": True, "optimizer.lr": 1e-2}
    with a_world():
        weights = train(config_of(folder, plain, saves)).weights
    return weights, folder / "run/checkpoint/step-80.hf"


@pytest.mark.parametrize(
    ("keys", "name"),
    [({"mtp.engine": "head_by_head"}, "meta"), ({"mtp.heads": "sequential"}, "glm4_moe_hf")],
    ids=["parallel", "sequential"],
)
def test_heads_are_added_to_an_imported_trunk(tmp_path: Path, trained_trunk, keys, name) -> None:
    """What finetune_add_heads.toml does, from a Hugging Face folder to another one."""
    trunk, given = trained_trunk
    before = {file.name: file.read_bytes() for file in given.iterdir()}

    changes: dict[str, object] = {"mtp.train": "heads", "mtp.init": "copy_last_layer"}
    changes |= {"checkpoint.initial_load_in_hf": True, "checkpoint.initial_load_path": str(given)}
    changes |= {"validation.enable": True, "validation.freq": 2, "training.steps": 30}
    changes |= {"checkpoint.enable": True, "optimizer.lr": 1e-2}
    run = train(config_of(tmp_path / "heads", keys, changes))
    assert same(run.trunk, trunk)
    first, *_, last = (acceptance.marginal for acceptance in run.acceptance)
    assert all(b > a for a, b in zip(first, last, strict=True)), (first, last)
    assert sum(last) > sum(first) + 0.3

    out = tmp_path / "out"
    export_checkpoint(tmp_path / "heads/run", out, name)
    import_checkpoint(out, tmp_path / "back", name)
    found = weights(tmp_path / "back", load_toml(tmp_path / "back/config.toml"))
    assert same(found, run.weights)
    export_checkpoint(tmp_path / "heads/run", tmp_path / "hf", "llama_hf", drop_heads=True)
    same_trunk = load_file(tmp_path / "hf/model.safetensors")
    assert same(same_trunk, load_file(given / "model.safetensors"))
    assert before == {file.name: file.read_bytes() for file in given.iterdir()}


def test_a_run_leaves_a_hugging_face_folder(tmp_path: Path) -> None:
    options = {"checkpoint.enable": True, "checkpoint.last_save_in_hf": True}
    options |= {"model.converters": [], "mtp.num_future_tokens": 1}
    options |= {"checkpoint.export_dtype": "bfloat16", "training.steps": 2}
    run = train(config_of(tmp_path, options))
    folder = tmp_path / "run" / "checkpoint" / "step-2.hf"
    theirs, _ = load(folder)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.norm.weight, run.weights["norm.weight"].bfloat16())
    # It is no step of the run: the run goes on from its own.
    model, _, _ = load_for_inference(tmp_path / "run")
    assert torch.equal(model.norm.weight, run.weights["norm.weight"].bfloat16().float())
