"""Continue a text with a trained model: `python scripts/generate.py CHECKPOINT --prompt TEXT`.

CHECKPOINT is a step-N folder, or a run's folder, whose latest step is taken. With --speculative,
heads 2..n draft and head 1 verifies; --compare decodes the same prompt both ways and shows what
the heads gained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import Stats, generate, load_for_inference, next_logits
from torchtitan_mtp.models.transformer import Transformer

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a step-N folder, or a run's folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt_file", type=Path, help="a file with the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="default: 100")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--top_k", type=int, help="sample among the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample among the tokens of this much mass")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    parser.add_argument("--speculative", action="store_true", help="draft with heads 2..n")
    parser.add_argument("--num_draft", type=int, help="drafts a step; default: n - 1")
    parser.add_argument("--compare", action="store_true", help="plain and speculative, compared")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and cache; default: float32"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    return parser.parse_args(argv)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text. Errors: an unreadable file, nothing in it."""
    text = args.prompt
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {args.prompt_file}: can't be read: {error}") from error
    if not text:
        raise UserError("the prompt is empty: give some text to continue")
    return str(text)


def find_device(name: str | None) -> torch.device:
    """The named device. Error: torch does not know it, or does not have it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: can't be used: {reason}; try cpu or cuda") from error
    return device


def percent(rate: float) -> str:
    return "-" if rate != rate else f"{100 * rate:.1f}%"


def speed_table(runs: dict[str, Stats]) -> Table:
    """One line a run: what came out, in how many forwards, how fast."""
    table = Table()
    for column in ("decoding", "tokens", "forwards", "tokens/step", "tokens/s", "speed-up"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    base = next(iter(runs.values()))
    for name, stats in runs.items():
        table.add_row(
            name,
            str(stats.tokens),
            str(stats.forwards),
            f"{stats.tokens_per_step:.2f}",
            f"{stats.tokens_per_second:.1f}",
            f"{stats.tokens_per_second / base.tokens_per_second:.2f}x",
        )
    return table


def acceptance_table(stats: Stats) -> Table:
    """One line a head: how often its draft was head 1's own choice."""
    table = Table()
    for column in ("head", "drafts", "right", "right if all before were", "compared"):
        table.add_column(column, justify="right")
    rates = zip(stats.marginal, stats.conditional, stats.checked, strict=True)
    for k, (marginal, conditional, checked) in enumerate(rates, start=2):
        table.add_row(str(k), f"t+{k}", percent(marginal), percent(conditional), str(checked))
    return table


def comparison(
    model: Transformer, prompt: list[int], plain: list[int], speculative: list[int], greedy: bool
) -> str:
    """One line: did both ways give the same tokens, and if not, was it a tie?"""
    if plain == speculative:
        return "identical: both ways gave the same tokens"
    pairs = enumerate(zip(plain, speculative, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(plain), len(speculative)))
    line = f"different from new token {place + 1} on"
    if not greedy:
        return line
    logits = next_logits(model, prompt + plain[:place])
    first, second = logits.double().topk(2).values.tolist()
    # What sums over the width may differ by when they are added in another order.
    rounding = torch.finfo(logits.dtype).eps * model.args.dim**0.5 * max(abs(first), 1)
    verdict = "a tie in" if first - second <= rounding else "more than rounding explains in"
    dtype = str(logits.dtype).removeprefix("torch.")
    return f"{line}: its two best logits are {first - second:.1e} apart, {verdict} {dtype}"


def run(args: argparse.Namespace) -> None:
    text = read_prompt(args)
    model, tokenizer, config = load_for_inference(
        args.checkpoint, find_device(args.device), DTYPES[args.dtype]
    )
    prompt = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    options |= {"eos_id": tokenizer.eos_id, "softcap": config.loss.softcap}
    plain: dict[str, Any] = {}
    drafting: dict[str, Any] = {"speculative": True, "num_draft": args.num_draft}
    ways = {"speculative": drafting} if args.speculative or args.compare else {"plain": plain}
    if args.compare:
        ways = {"plain": plain, **ways}

    for way in ways.values():  # the first forwards of a process are slow
        generate(model, [prompt], min(8, args.max_new_tokens), **options, **way)
    runs = {
        name: generate(model, [prompt], args.max_new_tokens, **options, **way)
        for name, way in ways.items()
    }
    *_, last = runs.values()
    print(tokenizer.decode([*prompt, *last.tokens[0]]))
    # The text alone goes to stdout, so that it can be piped; a comparison is what was asked for.
    console = Console(stderr=not args.compare)
    console.print(speed_table({name: generation.stats for name, generation in runs.items()}))
    if "speculative" in runs:
        console.print(acceptance_table(last.stats))
    if args.compare:
        both = runs["plain"].tokens[0], runs["speculative"].tokens[0]
        console.print(comparison(model, prompt, *both, args.temperature == 0))
    length = len(prompt) + len(last.tokens[0])
    if length > config.training.seq_len:
        seen = config.training.seq_len
        console.print(f"note: {length} tokens, the model was trained on {seen} at a time")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
