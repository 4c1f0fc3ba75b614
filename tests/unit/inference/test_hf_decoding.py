"""Decoding with models that transformers runs: against its own `generate`, and drafts against full
forwards without any cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from lm_eval.api.instance import Instance
from tiny_models import batch_of
from torch import Tensor

from hf_folders import write_folder
from hf_models import CONFIGS
from torchtitan_mtp.cli import evaluate as evaluate_cli
from torchtitan_mtp.cli import generate as generate_cli
from torchtitan_mtp.config import MTP, JobConfig, to_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.hf_trunk import TrunkFolder
from torchtitan_mtp.inference import generate, load_for_inference
from torchtitan_mtp.inference.acceptance import measure_continuation
from torchtitan_mtp.inference.decoding import states_of
from torchtitan_mtp.inference.lm_eval_adapter import HarnessModel
from torchtitan_mtp.inference.rows import Rows
from torchtitan_mtp.models.hf import HFTrunk
from torchtitan_mtp.models.hf_config import sizes_of_config
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.mtp import add_heads

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [5], [3, 5, 8]]
N, COUNT = 3, 11
HEADS = ["parallel", "sequential", "medusa"]


def build(config: Any, heads: str = "", n: int = N) -> HFTrunk:
    """Weights large enough that every earlier token matters; few tokens, so that some drafts of
    random heads are right."""
    config.vocab_size = 11
    model = HFTrunk(config, sizes_of_config(config, 64, "causal"))
    if heads:
        add_heads(model, MTP(heads=heads, num_future_tokens=n))
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=generator))
    return model.eval().requires_grad_(False)


def reference(model: HFTrunk) -> Any:
    own = transformers.AutoModelForCausalLM.from_config(model.causal.config)
    trunk = {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}
    own.load_state_dict(trunk, strict=True)
    return own.eval()


def their_tokens(own: Any, prompts: list[list[int]], count: int = COUNT) -> list[list[int]]:
    """Each prompt's greedy continuation by transformers, one at a time."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = own.generate(
            ids, attention_mask=ids**0, max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model = build(CONFIGS[family]())
    expected = their_tokens(reference(model), PROMPTS)
    assert len({token for text in expected for token in text}) > 1
    assert generate(model, PROMPTS[:1], COUNT).tokens == expected[:1]
    assert generate(model, PROMPTS, COUNT).tokens == expected  # rows at places of their own


def full_logits(model: HFTrunk, text: list[int]) -> Tensor:
    """Teacher-forced logits [n, S, V] at S tokens, of which the future of the last is unknown."""
    return model.output(torch.cat(model(batch_of([*text, *[0] * (N - 1)], N))))


def naive_drafts(model: HFTrunk, known: list[int], count: int) -> list[int]:
    """What heads 2.. draft after the last of the known tokens, which head 1 has chosen."""
    drafts: list[int] = []
    for k in range(2, count + 2):
        future = [*known, *drafts, *[0] * N][: len(known) - 1 + N - 1]
        logits = model.output(torch.cat(model(batch_of(future, N))))  # at t[0] .. t[p]
        drafts.append(int(logits[k - 1, -1].argmax()))
    return drafts


def naive_speculation(model: HFTrunk, prompt: list[int]) -> tuple[list[int], Any]:
    """Blockwise parallel decoding by full forwards, counted by `Rows`."""
    rows = Rows(1, COUNT, None, N - 1)
    rows.start([[int(full_logits(model, prompt)[0, -1].argmax())]])
    while rows.left():
        known = [*prompt, *rows.tokens[0]]
        drafts = naive_drafts(model, known, min(N - 1, rows.left() - 1))
        choices = full_logits(model, [*known, *drafts])[0, len(known) - 1 :].argmax(-1)
        rows.accept([[known[-1], *drafts]], [choices.tolist()])
    finished = rows.finish(0.0, 0.0)
    return finished.tokens[0], finished.stats


# Beside plain attention: experts, windows in some or all layers, caps, sinks, scales, latents,
# recurrent layers.
FAMILIES = ["llama", "qwen3", "qwen3_moe", "gemma3", "gemma2", "gpt_oss", "granite", "deepseek_v3"]
FAMILIES += ["mistral_sliding", "cohere", "qwen3_next"]


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        # Each family with one kind of heads, in turn; with the others exhaustively.
        pytest.param(family, heads, marks=() if i % 3 == j else pytest.mark.exhaustive)
        for i, family in enumerate(FAMILIES)
        for j, heads in enumerate(HEADS)
    ],
)
def test_speculation_is_that_of_full_forwards(family: str, heads: str) -> None:
    model = build(CONFIGS[family](), heads)
    expected = [naive_speculation(model, prompt) for prompt in PROMPTS]
    assert [text for text, _ in expected] == generate(model, PROMPTS, COUNT).tokens
    for prompt, (text, counts) in zip(PROMPTS, expected, strict=True):
        found = generate(model, [prompt], COUNT, speculative=True)
        assert found.tokens == [text]
        for name in ("drafted", "agreed", "checked", "right", "forwards"):
            assert getattr(found.stats, name) == getattr(counts, name), name
    together = generate(model, PROMPTS, COUNT, speculative=True)
    assert together.tokens == [text for text, _ in expected]
    # Sampled among one token, all is as if it were greedy.
    sampled = generate(model, PROMPTS, COUNT, speculative=True, temperature=1.0, top_k=1)
    assert sampled.tokens == together.tokens and sampled.stats.right == together.stats.right


def test_some_drafts_are_right() -> None:
    stats = generate(build(CONFIGS["gemma3"](), "parallel"), PROMPTS, COUNT, speculative=True).stats
    assert 0 < sum(stats.right) < sum(stats.checked)


@pytest.mark.parametrize("heads", HEADS)
def test_acceptance_of_one_forward_foretells_the_steps(heads: str) -> None:
    model = build(CONFIGS["gpt_oss"](), heads)
    measured = measure_continuation(model, PROMPTS, COUNT)
    for drafts in range(1, N):
        found = generate(model, PROMPTS, COUNT, speculative=True, num_draft=drafts).stats
        assert found.tokens_per_step == pytest.approx(measured.tokens_per_step[drafts - 1])


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_states_of_texts_of_unequal_lengths(family: str) -> None:
    """What likelihoods are computed from, and transformers' logits."""
    model = build(CONFIGS[family]())
    own, states = reference(model), states_of(model, PROMPTS)
    for prompt, h in zip(PROMPTS, states, strict=True):
        theirs = own(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(model.output(h[: len(prompt)]), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("room", [12, 64])
def test_frequencies_that_change_with_the_length(room: int) -> None:
    """Longrope has others beyond `room` tokens, for the keys before them as well."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": room}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": room}
    model = build(transformers.Phi3Config(**CONFIGS["phi3"]().to_dict() | changes))
    expected = their_tokens(reference(model), PROMPTS)
    assert [generate(model, [p], COUNT).tokens[0] for p in PROMPTS] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compile": True}, "compile.*hf"), ({"speculative": True}, "linear_attention.*without")],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    config = CONFIGS["qwen3_5"]()
    config.layer_types = ["linear_attention"] * 4
    model = build(config, "parallel")
    with pytest.raises(UserError, match=message):
        generate(model, PROMPTS, COUNT, **options)


# ---------------------------------------------------------------- folders


def write_run(folder: Path, family: str, heads: str) -> HFTrunk:
    """What a run on a folder of transformers leaves: config.toml and checkpoint/step-N."""
    theirs, config = write_folder(folder / "hf", family), JobConfig()
    config.model.name, config.model.hf_assets_path = "hf", str(theirs)
    config.model.converters, config.training.seq_len = ["mtp"], 64
    config.mtp = MTP(heads=heads, num_future_tokens=N)
    read = transformers.AutoConfig.from_pretrained(theirs)
    model = HFTrunk(read, sizes_of_config(read, 64, "causal"))
    add_heads(model, config.mtp)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed=2)
    wanted = model.state_dict()
    for name, value in TrunkFolder(theirs, model).read():
        wanted[name].copy_(value)
    dcp.save(wanted, checkpoint_id=folder / "run" / "checkpoint" / "step-3", no_dist=True)
    (folder / "run" / "config.toml").write_text(to_toml(config))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("heads", HEADS)
def test_a_run_and_its_folder_decode(
    tmp_path: Path, heads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = write_run(tmp_path, "gemma2", heads)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    own = own.eval().requires_grad_(False)
    expected = their_tokens(own, PROMPTS)
    for folder in ("run", "hf"):
        model, tokenizer, config = load_for_inference(tmp_path / folder)
        assert config.model.name == "hf" and model.softcap == 30.0
        assert generate(model, PROMPTS, COUNT).tokens == expected
        lm = HarnessModel(model, tokenizer, config)
        ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("import", " a"), 0)])
        ids, start = tokenizer.encode("import a").tolist(), len(tokenizer.encode("import"))
        scores = own(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert found == pytest.approx(wanted, rel=1e-4)
    again, *_ = load_for_inference(tmp_path / "run")
    assert again.state_dict().keys() == saved.state_dict().keys()
    asked = ["--prompt", "import ", "--prompt", "a", "--max_new_tokens", "8", "--compare"]
    assert generate_cli.main([str(tmp_path / "run"), *asked]) == 0
    assert "the same tokens for 2 of 2 prompts" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("import numpy as np\n" * 40)
    asked = ["--source", str(tmp_path / "text.txt"), "--prompts", "2", "--max_new_tokens", "6"]
    asked += ["--prompt_tokens", "8", "--seq_len", "16", "--batch_size", "2"]
    assert evaluate_cli.main([str(tmp_path / "run"), *asked]) == 0
    assert "own greedy continuation: 10 tokens of 2 prompts" in capsys.readouterr().out


def test_a_folder_that_a_format_here_knows_stays_in_this_projects_code(tmp_path: Path) -> None:
    expected = []
    for family in ("llama", "mistral_sliding"):
        write_folder(tmp_path / family, family)
        model, *_ = load_for_inference(tmp_path / family)
        assert isinstance(model, Transformer if family == "llama" else HFTrunk)
        own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        expected.append(their_tokens(own, PROMPTS))
        assert generate(model, PROMPTS, COUNT).tokens == expected[-1]
    (tmp_path / "llama" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UserError, match="BertModel"):  # in the words of the formats
        load_for_inference(tmp_path / "llama")
