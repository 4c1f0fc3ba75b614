"""Continue what is typed, as one growing text or a conversation (`generate.py --interactive`)."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from typing import Any

from torchtitan_mtp.cli.arguments import check_generation, sampling
from torchtitan_mtp.cli.prompts import Conversation, Message, encode
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.decoding import check, most_drafts
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.text_stream import TextStream
from torchtitan_mtp.models.trunk import Trunk


def converse(
    args: argparse.Namespace,
    model: Trunk,
    tokenizer: Tokenizer,
    config: JobConfig,
    chat: Any,
) -> None:
    """Continue what is typed, as one growing text or a conversation, until the input ends.

    What is longer than the model was trained on, answer included, loses its beginning (`fitted`);
    of a conversation never the last message, which stays whole and is told.
    """
    if args.compare or args.compile or args.cuda_graphs or args.num_draft == "auto":
        raise UserError(
            "--interactive goes without --compare, --compile, --cuda_graphs and --num_draft auto"
        )
    check(model, [[tokenizer.eos_id]], args.max_new_tokens)
    check_generation(model, f"--max_new_tokens {args.max_new_tokens}", 1, args.max_new_tokens)
    options = sampling(args, model) | {"eos_id": tokenizer.eos_ids}
    Sampler(**sampling(args, model))  # what they must not be is said before anything is typed
    if args.speculative:
        options |= {"speculative": True, "num_draft": most_drafts(model, args.num_draft)}
    seq_len = config.training.seq_len
    most = max(seq_len - args.max_new_tokens, seq_len // 2)  # of the text before an answer
    asking = "> " if sys.stdin.isatty() else ""
    if asking:
        print(
            "An empty line begins a new text, Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr
        )
    text, messages = "", list[Message]()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = read_line(asking)
            if not line:
                text, messages = "", []
                continue
            # All of it anew: pieces would each begin with a space, in SentencePiece's way.
            text += f"\n{line}" if text else line
            messages.append({"role": "user", "content": line})
            if chat is None:
                print(line, end="", flush=True)
            prompt = fitted(args, tokenizer, chat, messages if chat else text, most)
            if len(prompt) > most:
                told = f"{len(prompt)} tokens, the model was trained on {seq_len} at a time"
                print(f"note: {told}", file=sys.stderr)
            shown = TextStream(tokenizer, args.stop, prompt, partial(print, end="", flush=True))
            answer(model, prompt, args.max_new_tokens, shown, options)
            options["seed"] = (options["seed"] + 1) % 2**64  # equal lines get other samples
            text += shown.text
            messages.append({"role": "assistant", "content": shown.text})


def read_line(asking: str) -> str:
    """The next line that is typed. EOFError: there is none."""
    try:
        return input(asking)
    except UnicodeDecodeError as error:
        reason = f"can't be read as {error.encoding}: {error.reason}; give text in that encoding"
        raise UserError(f"--interactive: the input {reason}") from error


def fitted(
    args: argparse.Namespace, tokenizer: Tokenizer, chat: Any, typed: str | list[Message], most: int
) -> list[int]:
    """The ids of what was typed, `most` of them: of a text its end, behind the prefix. Of a
    conversation, which loses its oldest messages; the last one stays, however long it is."""
    if isinstance(typed, str):
        ids, first = encode(args, tokenizer, chat, typed), len(tokenizer.prefix)
        return ids[:first] + ids[max(first, len(ids) - most + first) :]
    ids = encode(args, tokenizer, chat, Conversation(typed))
    while len(ids) > most and len(typed) > 1:
        del typed[:2]  # with its answer
        ids = encode(args, tokenizer, chat, Conversation(typed))
    return ids


def answer(
    model: Trunk, prompt: list[int], most: int, shown: TextStream, options: dict[str, Any]
) -> None:
    """Write what follows the prompt to stdout as it comes, its cost to stderr."""
    stats = None
    with contextlib.suppress(KeyboardInterrupt):
        stats = generate(model, [prompt], most, texts=[shown], **options).stats
    shown.finish()
    print(flush=True)
    if stats is not None:
        rate = "" if stats.steps == 0 else f"{stats.tokens_per_step:.2f} tokens/step, "
        speed = f"{stats.tokens / stats.seconds:.1f} tokens/s"
        print(f"[{stats.tokens} tokens, {rate}{speed}]", file=sys.stderr)
