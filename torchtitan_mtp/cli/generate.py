"""Continue texts with a trained model.

CHECKPOINT is a step-N folder, a run's folder, whose latest step is taken, or a Hugging Face folder.
With --speculative, heads 2..n draft and head 1 verifies; --compare decodes the same prompts both
ways and shows what the heads gained. --interactive reads texts from the terminal, line by line.
--output writes the answers to many prompts as records to train on. --show and --html show which
head drafted each token.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchtitan_mtp.cli.answers import BATCH_SIZE, check_output, write_answers
from torchtitan_mtp.cli.arguments import check_generation, exit_status, new_parser, path, sampling
from torchtitan_mtp.cli.converse import converse
from torchtitan_mtp.cli.prompts import Prompt, encode, read_prompts
from torchtitan_mtp.cli.show import print_shown, show
from torchtitan_mtp.cli.show_html import write_page
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.chat import chat_tokenizer
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.distributed.shared_cores import SharedCores
from torchtitan_mtp.errors import UserError, memory_told
from torchtitan_mtp.inference import Generation, Stats, generate, load_for_inference, next_logits
from torchtitan_mtp.inference.load import DTYPES, find_device
from torchtitan_mtp.inference.stats import ratio
from torchtitan_mtp.inference.text_stream import TextStream
from torchtitan_mtp.models.trunk import Trunk


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """--help, and what argparse refuses, end the program: SystemExit, of status 0 and 2."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=os.path.expanduser,
        help="a step-N folder, a run's folder, or a HF folder",
    )
    _add_texts(parser)
    _add_decoding(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and cache; default: bfloat16 on a GPU that multiplies it, else float32",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    return parser.parse_args(argv)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """What is continued, and where the answers go."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", action="append", default=[], help="the text to continue; may be repeated"
    )
    prompt.add_argument(
        "--prompt_file",
        type=path,
        help='a file with the text to continue, or FILE.jsonl with a {"prompt": TEXT} a line (with '
        '--chat also {"messages": [{"role": ROLE, "content": TEXT}, ...]})',
    )
    prompt.add_argument(
        "--interactive", action="store_true", help="ask for text, show its continuation as it comes"
    )
    parser.add_argument(
        "--output",
        type=path,
        help="write the answers to --prompt_file FILE.jsonl as records to train on to this .jsonl "
        "file; where it has some, go on after them",
    )
    parser.add_argument(
        "--batch_size", type=int, help=f"with --output: prompts at a time; default: {BATCH_SIZE}"
    )
    parser.add_argument("--chat", action="store_true", help="ask in the tokenizer's chat template")
    parser.add_argument(
        "--special_tokens", action="store_true", help="special tokens that a prompt spells are such"
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    """How long, by which tokens, and how fast."""
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
        "--show", action="store_true", help="colour each token by the head that drafted it"
    )
    parser.add_argument(
        "--html", type=path, metavar="F.html", help="the same as a page for a browser"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile a step; the first ones take long"
    )
    parser.add_argument(
        "--cuda_graphs", action="store_true", help="launch a step as a whole, on a GPU"
    )


def number_of_drafts(text: str) -> int | str:
    """`type=` of --num_draft."""
    return text if text == "auto" else int(text)


def percent(rate: float, of: int) -> str:
    """Such as "25.0% of 8"."""
    return f"{100 * rate:.1f}% of {of}" if of else "never compared"


def figure(value: float, form: str) -> str:
    """In this format, or "-" where there is none (nan)."""
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
    model: Trunk, prompt: list[int], plain: list[int], speculative: list[int], greedy: bool
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
    model: Trunk, prompts: list[list[int]], runs: dict[str, Generation], greedy: bool
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


def continue_prompts(
    args: argparse.Namespace,
    asked: list[Prompt],
    model: Trunk,
    tokenizer: Tokenizer,
    config: JobConfig,
    chat: Any,
) -> None:
    """All prompts as one batch: their texts, and what they cost. Of conversations, the answers."""
    prompts = [encode(args, tokenizer, chat, prompt) for prompt in asked]
    length, seen = max(map(len, prompts)) + args.max_new_tokens, config.training.seq_len
    name = f"--max_new_tokens {args.max_new_tokens} for {len(prompts)} prompt(s)"
    check_generation(model, name, len(prompts), length)
    static = {"compile": args.compile, "cuda_graphs": args.cuda_graphs}
    options = sampling(args, model) | {"eos_id": tokenizer.eos_ids} | static
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
    write_texts(args, prompts, last, tokenizer)
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


def write_texts(
    args: argparse.Namespace, prompts: list[list[int]], last: Generation, tokenizer: Tokenizer
) -> None:
    """The texts to stdout, with --show in the heads' colours; to --html as a page."""
    asked = ["" if args.chat else tokenizer.decode(prompt) for prompt in prompts]
    texts = [TextStream(tokenizer, args.stop, prompt) for prompt in prompts]
    for text, new in zip(texts, last.tokens, strict=True):
        for token in new:
            text.add(token)
        text.finish()
    if args.show or args.html is not None:
        sizes = [len(text.text) if text.stopped else None for text in texts]
        shown = show(tokenizer, prompts, last, asked, sizes)
    if args.html is not None:
        write_page(shown, args.checkpoint, args.html)
        print(f"wrote {args.html}", file=sys.stderr)
    if args.show:
        print_shown(shown, Console())
        return
    for i, (prompt, text) in enumerate(zip(asked, texts, strict=True), start=1):
        if len(texts) > 1:
            print(f"--- {i} of {len(texts)}")
        print(prompt + text.text)


def run(args: argparse.Namespace) -> None:
    """UserError for arguments that do not go together, and for what can't be read or decoded."""
    if args.num_draft is not None and not (args.speculative or args.compare):
        raise UserError("--num_draft: needs --speculative or --compare")
    if "" in args.stop:
        raise UserError("--stop: the text is empty: give one that ends the answer")
    check_output(args)
    for name in ("show", "html"):
        if getattr(args, name) and (args.interactive or args.output is not None):
            raise UserError(f"--{name} goes without --interactive and --output")
        if getattr(args, name) and not (args.speculative or args.compare):
            raise UserError(f"--{name}: needs --speculative or --compare, for heads that draft")
    # What can't be read is said before a model is loaded.
    prompts = None if args.interactive else read_prompts(args)

    def load() -> tuple[Trunk, Tokenizer, JobConfig]:
        device = find_device(args.device)
        loaded = load_for_inference(args.checkpoint, device, DTYPES.get(args.dtype))
        loaded[1].encode("")  # that there is no tokenizer is said before anything is typed
        return loaded

    if args.output is not None and prompts is not None:
        write_answers(args, prompts, load)
        return
    model, tokenizer, config = load()
    chat = chat_tokenizer(tokenizer.place) if args.chat else None
    if prompts is None:
        converse(args, model, tokenizer, config, chat)
    else:
        continue_prompts(args, prompts, model, tokenizer, config, chat)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on stderr that says what is wrong."""
    args = parse_arguments(argv)

    def program() -> None:
        with SharedCores(), memory_told("lower --max_new_tokens, or give fewer prompts at a time"):
            run(args)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
