"""Measure what a model's heads are worth.

CHECKPOINT is a step-N folder, a run's folder, whose latest step is taken, or a Hugging Face folder.

On held-out text: loss, accuracy and acceptance of every head, and bits per byte. On the model's own
greedy continuation of prompts from that text: how often heads 2..n draft what head 1 says next, and
the tokens a step that `generate.py --speculative` gets from it. With --tasks, the tasks of
lm-evaluation-harness instead (`pip install lm-eval`). docs/decoding.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchtitan_mtp.cli.arguments import check_generation, exit_status, new_parser, path
from torchtitan_mtp.cli.figures import check_figure, new_figure, save_figure
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.distributed.memory import check_memory
from torchtitan_mtp.distributed.shared_cores import SharedCores
from torchtitan_mtp.errors import UserError, memory_told, writing
from torchtitan_mtp.inference import load_for_inference
from torchtitan_mtp.inference.acceptance import (
    PROMPTS_AT_A_TIME,
    Acceptance,
    Continuation,
    measure_continuation,
)
from torchtitan_mtp.inference.held_out import Text, find_text
from torchtitan_mtp.inference.load import DTYPES, find_device
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.validation import TextMetrics, evaluate_windows
from torchtitan_mtp.writing import check_writable, written_whole

TASK_OPTIONS = (
    "num_fewshot",
    "limit",
    "fewshot_as_multiturn",
    "apply_chat_template",
    "system_instruction",
)
HEADS_ONLY = ("source", "batches", "prompts", "prompt_tokens", "max_new_tokens", "plot")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """--help, and what argparse refuses, end the program: SystemExit, of status 0 and 2."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=os.path.expanduser,
        help="a step-N folder, a run's folder, or a HF folder",
    )
    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--source",
        type=os.path.expanduser,
        help="a dataset's name, a file, a folder or a glob; default (and for the name of what the "
        "run trained on): what the run held out; all of it, if validation was off",
    )
    text.add_argument("--seq_len", type=int, help="tokens of a window; default: the run's, or 2048")
    text.add_argument("--batch_size", type=int, help="windows at a time; default: the run's")
    text.add_argument(
        "--batches", type=int, help="-1: all of the text; default: as the run validates, else 20"
    )
    own = parser.add_argument_group("own continuation")
    own.add_argument("--prompts", type=int, default=128, help="how many; 0: none; default: 128")
    own.add_argument("--prompt_tokens", type=int, default=64, help="tokens of each; default: 64")
    own.add_argument("--max_new_tokens", type=int, default=128, help="default: 128")
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument("--tasks", help="names, with commas between them")
    tasks.add_argument(
        "--include_path",
        type=os.path.expanduser,
        help="a folder with the YAML files of further tasks",
    )
    tasks.add_argument("--num_fewshot", type=int, help="examples before each question")
    tasks.add_argument("--system_instruction", help="what a conversation begins with")
    tasks.add_argument(
        "--apply_chat_template", action="store_true", help="ask as the tokenizer's template says"
    )
    tasks.add_argument(
        "--fewshot_as_multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with it, examples are earlier turns; default: yes",
    )
    tasks.add_argument("--limit", type=int, help="questions of each task; default: all")
    parser.add_argument("--json", type=path, help="also write the figures to this file")
    parser.add_argument("--plot", type=path, help="also draw them, as .png, .svg or .pdf")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and cache; default: float32"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Numbers that make no sense are refused before anything is loaded."""
    if args.batches is not None and not 1 <= args.batches < 2**31 and args.batches != -1:
        raise UserError(f"--batches {args.batches}: expected 1 or more, or -1 for all")
    lowest = {"seq_len": 1, "batch_size": 1, "prompts": 0, "prompt_tokens": 1}
    lowest |= {"max_new_tokens": 2, "num_fewshot": 0, "limit": 1}
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: expected {least} or more")
    defaults = parse_arguments([args.checkpoint])
    for name in HEADS_ONLY if args.tasks else ("include_path", *TASK_OPTIONS):
        if getattr(args, name) != getattr(defaults, name):
            raise UserError(f"--{name}: goes {'without' if args.tasks else 'with'} --tasks")
    if args.json:
        check_writable(args.json, f"--json {args.json}")
    if args.plot:
        if not args.prompts:
            raise UserError("--plot: draws the own continuation, of which --prompts 0 has none")
        check_figure(args.plot)


def measure_on_text(
    args: argparse.Namespace, text: Text, model: Trunk, tokenizer: Tokenizer, run: JobConfig
) -> TextMetrics:
    """The heads on windows of the text."""
    validation, training = run.validation, run.training
    mine = validation if validation.enable else training
    seq_len, batch_size = args.seq_len or mine.seq_len, args.batch_size or mine.local_batch_size
    batches = args.batches or (validation.steps if validation.enable else 20)
    check_length(model, seq_len, "--seq_len")
    n = model.spec.num_future_tokens
    size = 16 * (n + 1) * batch_size * seq_len  # bytes: labels and the like, int64
    check_memory({f"--batch_size {batch_size}, --seq_len {seq_len}": size}, torch.device("cpu"))
    windows = text.windows(tokenizer, n, seq_len, batch_size)
    return evaluate_windows(model, windows, tokenizer, batches=batches, softcap=model.softcap)


def measure_on_continuation(
    args: argparse.Namespace, text: Text, model: Trunk, tokenizer: Tokenizer
) -> Continuation:
    """The heads on the model's greedy continuation of prompts from the text."""
    length = args.prompt_tokens + args.max_new_tokens
    check_length(model, length, "--prompt_tokens and --max_new_tokens")
    prompts = text.prompts(tokenizer, args.prompts, args.prompt_tokens)
    rows = min(len(prompts), PROMPTS_AT_A_TIME)
    check_generation(
        model, f"--max_new_tokens {args.max_new_tokens} of {rows} prompts", rows, length
    )
    return measure_continuation(model, prompts, args.max_new_tokens, eos_id=tokenizer.eos_ids)


def check_length(model: Trunk, length: int, what: str) -> None:
    """UserError where the model takes fewer tokens; what: the arguments that ask for them."""
    if length > model.args.max_seq_len:
        longest = model.args.max_seq_len
        raise UserError(f"{what}: {length} tokens, but the model takes {longest} at most")


def percent(rate: float) -> str:
    """Such as "25.0%", or "-" where there is none (nan)."""
    return "-" if math.isnan(rate) else f"{100 * rate:.1f}%"


def figure(value: float, digits: int = 2) -> str:
    """With so many digits behind the point, or "-" where there is none (nan)."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def text_table(measure: TextMetrics) -> Table:
    """One line a head: what it makes of the text, and how often it says what head 1 would."""
    table = Table()
    for column in ("head", "predicts", "loss", "accuracy", "right", "if all before were"):
        table.add_column(column, justify="right")
    rates = [("", "")] + [
        (percent(marginal), percent(conditional))
        for marginal, conditional in zip(
            measure.acceptance.marginal, measure.acceptance.conditional, strict=True
        )
    ]
    rows = zip(measure.losses, measure.accuracies, rates, strict=True)
    for k, (loss, accuracy, agreement) in enumerate(rows, start=1):
        table.add_row(str(k), f"t+{k}", figure(loss, 4), percent(accuracy), *agreement)
    return table


def continuation_table(measure: Continuation) -> Table:
    """One line a drafting head: acceptance, and what drafting up to that head yields."""
    table = Table()
    columns = ("head", "drafts", "right", "if all before were", "tokens/step", "position mean")
    for column in columns:
        table.add_column(column, justify="right")
    found = measure.acceptance
    rows = zip(
        found.marginal,
        found.conditional,
        measure.tokens_per_step,
        measure.standard_errors,
        found.tokens_per_step,
        strict=True,
    )
    for k, (marginal, conditional, rate, error, mean) in enumerate(rows, start=2):
        rates = percent(marginal), percent(conditional)
        table.add_row(str(k), f"t+{k}", *rates, f"{figure(rate)} ± {figure(error)}", figure(mean))
    return table


def rates_of(acceptance: Acceptance) -> dict[str, list[float]]:
    """For people's programs: as in docs/decoding.md, from head 2 on."""
    return {
        "marginal": acceptance.marginal,
        "conditional": acceptance.conditional,
        "position_mean_tokens_per_step": acceptance.tokens_per_step,
    }


def evaluate_heads(
    args: argparse.Namespace,
    model: Trunk,
    tokenizer: Tokenizer,
    run: JobConfig,
    console: Console,
) -> dict[str, Any]:
    """Measure on text and on the own continuation, print, and return it as plain data."""
    text = find_text(run, args.source)
    measure = measure_on_text(args, text, model, tokenizer, run)
    console.print(f"text: {measure.targets[0]:,} tokens of {text.about}")
    console.print(text_table(measure))
    console.print(
        f"bits per byte: {figure(measure.bits_per_byte, 4)} ({measure.num_bytes:,} bytes)"
    )
    results: dict[str, Any] = {
        "text": {
            "about": text.about,
            "losses": measure.losses,
            "accuracies": measure.accuracies,
            "targets": measure.targets,
            "bytes": measure.num_bytes,
            "bits_per_byte": measure.bits_per_byte,
            **rates_of(measure.acceptance),
        }
    }
    if model.mtp is None or not args.prompts:
        return results
    own = measure_on_continuation(args, text, model, tokenizer)
    console.print(
        f"own greedy continuation: {sum(own.tokens):,} tokens of {len(own.tokens)} prompts"
    )
    console.print(continuation_table(own))
    results["continuation"] = {
        "prompts": len(own.tokens),
        "tokens": sum(own.tokens),
        **rates_of(own.acceptance),
        "tokens_per_step": own.tokens_per_step,
        "standard_errors": own.standard_errors,
    }
    return results


def evaluate_tasks(
    args: argparse.Namespace,
    model: Trunk,
    tokenizer: Tokenizer,
    run: JobConfig,
    console: Console,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, print their metrics, and return them as plain data."""
    try:
        from torchtitan_mtp.cli.tasks import run_tasks, show
        from torchtitan_mtp.inference.lm_eval_adapter import HarnessModel
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness: pip install lm-eval ({error})"
        ) from None
    lm = HarnessModel(model, tokenizer, run, batch_size=args.batch_size or 8)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.seq_len:
        check_length(model, args.seq_len, "--seq_len")
        lm.max_length = args.seq_len
    options = {key: getattr(args, key) for key in TASK_OPTIONS}
    return {"tasks": show(run_tasks(lm, names, args.include_path, log_samples=False, **options))}


def draw(results: dict[str, Any], out: Path) -> None:
    """Acceptance of every head, and tokens a step by the number of drafts."""
    own, text = results["continuation"], results["text"]
    heads = range(2, len(own["marginal"]) + 2)
    left, right = (figure := new_figure(8, 3.4)).subplots(1, 2)
    bars = {"own text": own["marginal"], "own text, if all before were": own["conditional"]}
    bars["held-out text"] = text["marginal"]
    for j, (label, rates) in enumerate(bars.items()):
        left.bar([k + 0.27 * (j - 1) for k in heads], rates, 0.25, label=label)
    left.set(xlabel="head", ylabel="drafts that are right", xticks=heads, ylim=(0, 1.3))
    left.set_yticks([0, 0.25, 0.5, 0.75, 1])
    drafts = range(1, len(own["marginal"]) + 1)
    measured = own["tokens_per_step"]
    right.errorbar(drafts, measured, own["standard_errors"], marker="o", label="decoding")
    mean = own["position_mean_tokens_per_step"]
    right.plot(drafts, mean, "--", label="mean over positions")
    right.set(xlabel="drafts a step", ylabel="tokens a step", xticks=drafts, ylim=(1, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, out)


def write_json(results: dict[str, Any], out: Path) -> None:
    """Of what is not finite, null, which JSON has. UserError where it can't be written."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with writing(f"--json {out}"), written_whole(out) as file:
        file.write_text(json.dumps(plain(results), indent=2) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """UserError for arguments that make no sense, and for what can't be read, measured, written."""
    check_arguments(args)
    is_hf = (Path(args.checkpoint) / "config.json").is_file()
    if is_hf and not (args.source or args.tasks):
        raise UserError(
            "--source: a Hugging Face folder does not say what to evaluate it on; name a text"
        )
    model, tokenizer, config = load_for_inference(
        args.checkpoint, find_device(args.device), DTYPES[args.dtype]
    )
    if args.plot and model.mtp is None:
        raise UserError("--plot: the model has no heads 2..n to draw")
    console = Console()
    if (
        is_hf and args.seq_len is None and not args.tasks
    ):  # the file has the longest that the model takes
        args.seq_len = min(config.training.seq_len, 2048)
    measure = evaluate_tasks if args.tasks else evaluate_heads
    results = {"checkpoint": args.checkpoint, **measure(args, model, tokenizer, config, console)}
    if args.json:
        write_json(results, args.json)
        print(f"wrote {args.json}")
    if args.plot:
        draw(results, args.plot)
        print(f"wrote {args.plot}")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on stderr that says what is wrong."""
    args = parse_arguments(argv)

    def program() -> None:
        with SharedCores(), memory_told("lower --batch_size, --prompts or --max_new_tokens"):
            run(args)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
