"""Continue texts with a trained model.

CHECKPOINT is a step-N folder, a run's folder, whose latest step is taken, or a Hugging Face folder.
With --speculative, heads 2..n draft and head 1 verifies; --compare decodes the same prompts both
ways and shows what the heads gained. --interactive reads texts from the terminal, line by line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchtitan_mtp.cli.arguments import check_generation, path
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.distributed.shared_cores import SharedCores
from torchtitan_mtp.errors import UserError, memory_told
from torchtitan_mtp.inference import Generation, Stats, generate, load_for_inference, next_logits
from torchtitan_mtp.inference.decoding import check, most_drafts, stream
from torchtitan_mtp.inference.load import DTYPES, find_device
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.stats import ratio
from torchtitan_mtp.inference.text_stream import TextStream
from torchtitan_mtp.models.transformer import Transformer


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=os.path.expanduser,
        help="a step-N folder, a run's folder, or a HF folder",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", action="append", default=[], help="the text to continue; may be repeated"
    )
    prompt.add_argument(
        "--prompt_file",
        type=path,
        help='a file with the text to continue, or FILE.jsonl with a {"prompt": TEXT} a line',
    )
    prompt.add_argument(
        "--interactive", action="store_true", help="ask for text, show its continuation as it comes"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, help="default: 100")
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this text; may be repeated"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--top_k", type=int, help="sample among the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample among the tokens of this much mass")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    parser.add_argument("--speculative", action="store_true", help="draft with heads 2..n")
    parser.add_argument(
        "--num_draft",
        type=number_of_drafts,
        metavar="N|auto",
        help="drafts a step; auto: as many as have paid of late; default: n - 1",
    )
    parser.add_argument("--compare", action="store_true", help="plain and speculative, compared")
    parser.add_argument(
        "--compile", action="store_true", help="compile a step; the first ones take long"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and cache; default: float32"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    return parser.parse_args(argv)


def number_of_drafts(text: str) -> int | str:
    return text if text == "auto" else int(text)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue. Errors: an unreadable file, a line that is no record, no text."""
    prompts = args.prompt
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {args.prompt_file}: can't be read: {error}") from error
        is_records = args.prompt_file.suffix == ".jsonl"
        prompts = read_records(args.prompt_file, text) if is_records else [text]
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty: give some text to continue")
    return list(prompts)


def read_records(file: os.PathLike[str], text: str) -> list[str]:
    """The prompts of a file of JSON records, one a line; empty lines are passed over."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f'{file}:{number}: expected {{"prompt": TEXT}}, found {line[:40]}')
        prompts.append(prompt)
    return prompts


def percent(rate: float, of: int) -> str:
    return f"{100 * rate:.1f}% of {of}" if of else "never compared"


def figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def speed_table(runs: dict[str, Stats]) -> Table:
    """One line a run: what came out, in how many forwards, how fast."""
    table = Table()
    for column in ("decoding", "tokens", "forwards", "tokens/step", "tokens/s", "speed-up"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    base = next(iter(runs.values())).tokens_per_second
    for name, stats in runs.items():
        table.add_row(
            name,
            str(stats.tokens),
            str(stats.forwards),
            figure(stats.tokens_per_step, "{:.2f}"),
            figure(stats.tokens_per_second, "{:.1f}"),
            figure(ratio(stats.tokens_per_second, base), "{:.2f}x"),
        )
    return table


def acceptance_table(stats: Stats) -> Table:
    """One line a head: how often its draft was head 1's own choice."""
    table = Table()
    for column in ("head", "drafts", "right", "right if all before were"):
        table.add_column(column, justify="right")
    rates = zip(stats.marginal, stats.drafted, stats.conditional, stats.checked, strict=True)
    for k, (marginal, drafted, conditional, checked) in enumerate(rates, start=2):
        rates_shown = percent(marginal, drafted), percent(conditional, checked)
        table.add_row(str(k), f"t+{k}", *rates_shown)
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
        return f"{line}: two samples of one distribution"
    logits = next_logits(model, prompt + plain[:place])
    first, second = logits.double().topk(2).values.tolist()
    # What sums over the width may differ by when they are added in another order.
    rounding = torch.finfo(logits.dtype).eps * model.args.dim**0.5 * max(abs(first), 1)
    verdict = "a tie in" if first - second <= rounding else "more than rounding explains in"
    dtype = str(logits.dtype).removeprefix("torch.")
    return f"{line}: its two best logits are {first - second:.1e} apart, {verdict} {dtype}"


def comparisons(
    model: Transformer, prompts: list[list[int]], runs: dict[str, Generation], greedy: bool
) -> list[str]:
    """`comparison` of each prompt; those that are identical, together."""
    texts = zip(prompts, runs["plain"].tokens, runs["speculative"].tokens, strict=True)
    lines = [comparison(model, *text, greedy) for text in texts]
    if len(lines) == 1:
        return lines
    others = [
        f"prompt {i}: {line}"
        for i, line in enumerate(lines, start=1)
        if not line.startswith("identical")
    ]
    same = len(lines) - len(others)
    return [
        f"identical: both ways gave the same tokens for {same} of {len(lines)} prompts",
        *others,
    ]


def sampling(args: argparse.Namespace, config: JobConfig) -> dict[str, Any]:
    """What `generate` and `Sampler` take."""
    names = ("temperature", "top_k", "top_p", "seed")
    return {name: getattr(args, name) for name in names} | {"softcap": config.loss.softcap}


def continue_prompts(
    args: argparse.Namespace,
    texts: list[str],
    model: Transformer,
    tokenizer: Tokenizer,
    config: JobConfig,
) -> None:
    """All prompts as one batch: their texts, and what they cost."""
    prompts = [tokenizer.prompt(text) for text in texts]
    length, seen = max(map(len, prompts)) + args.max_new_tokens, config.training.seq_len
    name = f"--max_new_tokens {args.max_new_tokens} for {len(prompts)} prompt(s)"
    check_generation(model, name, len(prompts), length)
    options = sampling(args, config) | {"eos_id": tokenizer.eos_ids, "compile": args.compile}
    drafting: dict[str, Any] = {"speculative": True, "num_draft": args.num_draft}
    speculative = args.speculative or args.compare
    ways: dict[str, dict[str, Any]] = {"speculative": drafting} if speculative else {"plain": {}}
    if args.compare:
        ways = {"plain": {}, **ways}

    # The first forwards of a process are slow, and what is compiled is of one length.
    warm_up = args.max_new_tokens if args.compile else min(8, args.max_new_tokens)
    for way in ways.values():
        generate(model, prompts, warm_up, **options, **way)
    runs = {}
    for name, way in ways.items():
        ends = [TextStream(tokenizer, args.stop, prompt) for prompt in prompts if args.stop]
        runs[name] = generate(model, prompts, args.max_new_tokens, texts=ends, **options, **way)
    *_, last = runs.values()
    for i, (prompt, new) in enumerate(zip(prompts, last.tokens, strict=True), start=1):
        if len(prompts) > 1:
            print(f"--- {i} of {len(prompts)}")
        text = TextStream(tokenizer, args.stop, prompt)
        for token in new:
            text.add(token)
        print(tokenizer.decode(prompt) + text.finish())
    # The text alone goes to stdout, so that it can be piped; a comparison is what was asked for.
    console = Console(stderr=not args.compare)
    console.print(speed_table({name: generation.stats for name, generation in runs.items()}))
    if speculative:
        console.print(acceptance_table(last.stats))
    if args.compare:
        for line in comparisons(model, prompts, runs, args.temperature == 0):
            console.print(line)
    if length > seen:
        console.print(f"note: {length} tokens, the model was trained on {seen} at a time")


def converse(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, config: JobConfig
) -> None:
    """Continue what is typed, as one growing text, until the input ends.

    Of a text longer than the model was trained on, answer included, the beginning is dropped.
    """
    if args.compare or args.compile or args.num_draft == "auto":
        raise UserError("--interactive goes without --compare, --compile and --num_draft auto")
    check(model, [[tokenizer.eos_id]], args.max_new_tokens)
    check_generation(model, f"--max_new_tokens {args.max_new_tokens}", 1, args.max_new_tokens)
    drafts = most_drafts(model, args.num_draft) if args.speculative else 0
    seq_len = config.training.seq_len
    most = max(seq_len - args.max_new_tokens, seq_len // 2)  # of the text before an answer
    sampler = Sampler(**sampling(args, config))
    asking = "> " if sys.stdin.isatty() else ""
    if asking:
        print(
            "An empty line begins a new text, Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr
        )
    text = ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input(asking)
            if not line:
                text = ""
                continue
            # All of it anew: pieces would each begin with a space, in SentencePiece's way.
            text += f"\n{line}" if text else line
            print(line, end="", flush=True)
            prompt = tokenizer.prompt(text)[-most:]
            shown = TextStream(tokenizer, args.stop, prompt)
            text += answer(model, tokenizer, prompt, args.max_new_tokens, sampler, drafts, shown)


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    sampler: Sampler,
    drafts: int,
    shown: TextStream,
) -> str:
    """Write what follows the prompt to stdout as it comes, its cost to stderr; the text."""
    told, count, steps, begin = 0, 0, -1, time.perf_counter()
    options: dict[str, Any] = {"num_draft": drafts, "eos_id": tokenizer.eos_ids, "texts": [shown]}
    with contextlib.suppress(KeyboardInterrupt):
        for new in stream(model, prompt, max_new_tokens, sampler, **options):
            steps += 1  # the first tokens are the prompt's
            count += len(new)
            print(shown.text[told:], end="", flush=True)
            told = len(shown.text)
    print(shown.finish()[told:], flush=True)
    seconds = time.perf_counter() - begin
    rate = f"{(count - 1) / steps:.2f} tokens/step, " if steps > 0 else ""
    print(f"[{count} tokens, {rate}{count / seconds:.1f} tokens/s]", file=sys.stderr)
    return shown.text


def run(args: argparse.Namespace) -> None:
    if args.num_draft is not None and not (args.speculative or args.compare):
        raise UserError("--num_draft: needs --speculative or --compare")
    # What can't be read is said before a model is loaded.
    texts = None if args.interactive else read_prompts(args)
    model, tokenizer, config = load_for_inference(
        args.checkpoint, find_device(args.device), DTYPES[args.dtype]
    )
    if texts is None:
        converse(args, model, tokenizer, config)
    else:
        continue_prompts(args, texts, model, tokenizer, config)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        with SharedCores(), memory_told("lower --max_new_tokens, or give fewer prompts"):
            run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
