"""`benchmark.py targets`: what tuning heads on a frozen model gains, by what they learn from."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import report
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.inference import generate, load_for_inference
from torchtitan_mtp.inference.acceptance import measure_continuation
from torchtitan_mtp.inference.held_out import find_text
from torchtitan_mtp.inference.stats import ratio
from torchtitan_mtp.models.trunk import Trunk

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "python_stdlib"
PROMPT_TOKENS = 64
BY_TRUNK = {kind: {"mtp.target": "trunk", "mtp.target_loss": kind} for kind in ("kl", "lk", "tv")}
# A rate that changes no weight: what copies of the last layer are worth as they are.
TUNINGS: dict[str, dict[str, Any]] = {
    "(untuned)": {"training.steps": 1, "optimizer.lr": 1e-30},
    "labels": {},
    **BY_TRUNK,
}
TRAINING = {
    "model.name": "hf",
    "checkpoint.initial_load_in_hf": True,
    "checkpoint.interval": 10**6,
    "training.dataset": SOURCE,
    "training.seed": 1,  # the documents that it holds out are the same for trunk and heads
    "training.validation_fraction": 0.15,
    "training.seq_len": 128,
    "training.local_batch_size": 8,
    "training.mixed_precision_param": "float32",
    "validation.enable": True,
    "validation.freq": 10**6,
    "validation.steps": 4,
    "lr_scheduler.warmup_steps": 20,
    "metrics.log_freq": 50,
}
HEADS = {
    "model.converters": "mtp",
    "mtp.heads": "parallel",
    "mtp.num_future_tokens": 4,
    "mtp.train": "heads",
    "mtp.init": "copy_last_layer",
}


class Decoded(NamedTuple):
    """Of every prompt, the tokens after its first and the steps that made them; of every drafting
    head, how often it was right if all before were."""

    tokens: list[int]
    steps: list[int]
    right: list[float]


def run(
    folder: Path = Path("outputs/targets"),
    trunk_steps: int = 600,
    head_steps: int = 300,
    prompts: int = 96,
    max_new_tokens: int = 64,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """A small Qwen3 is trained, exported and frozen; heads 2..4 are added and tuned on what the
    text says next, or on what the model does; then they draft.

    Prompts are pieces of documents that neither the model nor the heads trained on, one a document.
    ± is a standard error over prompts; the difference to "labels" is taken prompt by prompt, and
    its interval (95%) says nothing of how other seeds of the training would come out.

    Args:
        folder: where the runs go; those that are there are not run again.
        trunk_steps: of the model.
        head_steps: of each tuning.
        prompts: how many, at most as many as there are documents.
        max_new_tokens: of each continuation.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    folder = folder.resolve()
    model = train_model(folder, trunk_steps)
    for number, options in enumerate(TUNINGS.values()):
        steps = {"training.steps": head_steps, "optimizer.lr": 1e-3}
        assets = {"model.hf_assets_path": model}
        train(folder / f"heads_{number}", TRAINING | HEADS | assets | steps | options)
    found = {
        (how, name): decoded
        for number, name in enumerate(TUNINGS)
        for how, decoded in decode(folder / f"heads_{number}", prompts, max_new_tokens).items()
    }
    report(table(found), json, plot, bars=("tokens/step",))


def train_model(folder: Path, steps: int) -> Path:
    """The folder of a trained Qwen3 with a tokenizer, as transformers reads it."""
    import transformers  # what the other benchmarks do without

    base, model = folder / "base", folder / "model"
    if model.is_dir():
        return model
    tokenizer = ["--vocab_size", "512", "--output", base / "tokenizer.model"]
    program("scripts/train_tokenizer.py", "--source", SOURCE, *tokenizer)
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    own = {"model.hf_assets_path": base, "training.steps": steps, "optimizer.lr": 2e-3}
    train(folder / "trunk", TRAINING | {"mtp.num_future_tokens": 1} | own)
    program("scripts/export_checkpoint.py", folder / "trunk", model, "--format", "same")
    return model


def train(run: Path, options: dict[str, Any]) -> None:
    """Train in `run`, unless it is there already."""
    if (run / "checkpoint" / f"step-{options['training.steps']}").is_dir():
        return
    arguments: list[Any] = ["--checkpoint.enable", "--job.dump_folder", run]
    for key, value in options.items():
        arguments += [f"--{key}"] if value is True else [f"--{key}", value]
    program("-m", "torchtitan_mtp.train", *arguments)


def program(*arguments: Any) -> None:
    command = [sys.executable, *map(str, arguments)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def decode(run: Path, count: int, max_new_tokens: int) -> dict[str, Decoded]:
    """Greedily and at temperature 1, with all drafts."""
    model, tokenizer, config = load_for_inference(run)
    text = find_text(config, None)
    prompts = text.prompts(tokenizer, count, PROMPT_TOKENS)
    print(f"{run}: {len(prompts)} prompts of {text.about}", flush=True)
    own = measure_continuation(model, prompts, max_new_tokens, eos_id=tokenizer.eos_ids)
    greedy = Decoded(own.tokens, [steps[-1] for steps in own.steps], own.acceptance.conditional)
    return {"greedy": greedy, "sampled": sample(model, tokenizer, prompts, max_new_tokens)}


def sample(
    model: Trunk, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int
) -> Decoded:
    """Prompt by prompt, at temperature 1."""
    found = [
        generate(
            model,
            [prompt],
            max_new_tokens,
            temperature=1.0,
            seed=seed,
            eos_id=tokenizer.eos_ids,
            speculative=True,
        ).stats
        for seed, prompt in enumerate(prompts)
    ]
    checked = map(sum, zip(*(stats.checked for stats in found), strict=True))
    right = map(sum, zip(*(stats.right for stats in found), strict=True))
    return Decoded(
        [stats.tokens - stats.first_tokens for stats in found],
        [stats.steps for stats in found],
        list(map(ratio, right, checked)),
    )


def table(found: dict[tuple[str, str], Decoded]) -> list[dict[str, Any]]:
    """A row for every way of decoding and tuning, greedy ones first."""
    rows = []
    for how, name in sorted(found, key=lambda key: key[0]):
        decoded, labels = found[how, name], found[how, "labels"]
        rate, spread = rate_and_spread(decoded)
        other, other_spread = rate_and_spread(labels)
        apart = standard_error([a - b for a, b in zip(spread, other_spread, strict=True)])
        low, high = rate - other - 1.96 * apart, rate - other + 1.96 * apart
        heads = enumerate(decoded.right, start=2)
        rows.append(
            {"decoding": how, "heads learn from": name}
            | {f"head {k} right": f"{100 * right:.1f}%" for k, right in heads}
            | {"tokens/step": rate, "±": standard_error(spread)}
            | {"more than labels (95%)": "" if name == "labels" else f"{low:+.3f} to {high:+.3f}"}
        )
    return rows


def rate_and_spread(decoded: Decoded) -> tuple[float, list[float]]:
    """Tokens a step over all prompts, and by how much each prompt moves it (ratio estimator)."""
    steps_in_all = sum(decoded.steps)
    rate, mean = ratio(sum(decoded.tokens), steps_in_all), steps_in_all / len(decoded.steps)
    pairs = zip(decoded.tokens, decoded.steps, strict=True)
    return rate, [(tokens - rate * steps) / mean for tokens, steps in pairs]


def standard_error(spread: Sequence[float]) -> float:
    count = len(spread)
    return math.sqrt(ratio(sum(x * x for x in spread), count * (count - 1)))
