"""A model's own answers to a file of prompts, as records that the trainer reads.

Heads that are trained on them learn to draft what this model says (self-distillation: Medusa,
arXiv 2401.10774, section 2.3.2; FastMTP, arXiv 2509.18362). A line an answer, in the order of the
prompts, batch after batch. Whatever ends the program leaves whole lines and at most one that is cut
short; the next call cuts that off and goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torchtitan_mtp.cli.arguments import check_generation, sampling
from torchtitan_mtp.cli.prompts import Prompt, encode
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.chat import chat_tokenizer
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.decoding import check, most_drafts
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.text_stream import TextStream
from torchtitan_mtp.models.trunk import Trunk

BATCH_SIZE = 8
_TOLD_EVERY = 10.0  # seconds
Load = Callable[[], tuple[Trunk, Tokenizer, JobConfig]]


def check_output(args: argparse.Namespace) -> None:
    """UserError for arguments that don't go with --output, or need it."""
    if args.output is None:
        if args.batch_size is not None:
            raise UserError("--batch_size: needs --output")
        return
    if args.compare or args.prompt_file is None or args.prompt_file.suffix != ".jsonl":
        raise UserError(
            "--output: answers a --prompt_file FILE.jsonl, without --prompt, --interactive and "
            "--compare"
        )
    if args.special_tokens:
        raise UserError(
            "--output goes without --special_tokens: the trainer reads what spells a special token "
            "in a prompt as text; a chat template (--chat) spells such tokens"
        )
    if args.output.suffix != ".jsonl":
        raise UserError(
            f"--output {args.output}: expected FILE.jsonl, as which the trainer reads it"
        )
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: expected 1 or more")


def record(prompt: Prompt, answer: str) -> dict[str, Any]:
    """What the trainer reads: a document that begins with a prompt, or a conversation, of which an
    assistant's last message goes on with the answer."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": answer}
    before, last = prompt.messages, {"role": "assistant", "content": ""}
    if before[-1]["role"] == "assistant":
        *before, last = before
    tools = {} if prompt.tools is None else {"tools": prompt.tools}
    return tools | {"messages": [*before, last | {"content": last["content"] + answer}]}


def opening(prompt: Prompt) -> bytes:
    """What the line of a prompt begins with, up to its answer."""
    return json.dumps(record(prompt, "\0")).rpartition(r"\u0000")[0].encode()


def find_end(file: BinaryIO, args: argparse.Namespace, prompts: list[Prompt]) -> tuple[int, int]:
    """How many prompts have their answers in a file, and the bytes that these take.

    Error: a line that is no answer to its prompt.
    """
    count = size = 0
    for number, line in enumerate(file, start=1):
        begin = opening(prompts[number - 1]) if number <= len(prompts) else b"-"
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                if line.startswith(begin) and json.loads(line):
                    count, size = number, size + len(line)
        elif line.startswith(begin) or begin.startswith(line):  # cut short
            break
        if count < number:
            wanted = f"an answer to prompt {number} of {args.prompt_file}"
            if number > len(prompts):
                wanted = f"at most {len(prompts)} lines, as {args.prompt_file} has prompts"
            found = line[:40].decode(errors="replace").rstrip()
            raise UserError(
                f"{args.output}:{number}: expected {wanted}, found {found}; give the prompts that "
                "it answers, or another --output"
            )
    return count, size


@contextlib.contextmanager
def opened(args: argparse.Namespace, prompts: list[Prompt]) -> Iterator[tuple[int, int]]:
    """The descriptor of the file of answers, to be added to, and how many answers it has.

    Error: it can't be written, another process writes to it, or it is another file.
    """
    if args.output.exists() and not args.output.is_file():
        raise UserError(f"--output {args.output}: expected a file, found a folder or device")
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(open(args.output, "a+b"))
        except OSError as error:
            reason = f"can't be written: {error.strerror}"
            raise UserError(f"--output {args.output}: {reason}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {args.output}: another process writes to it") from None
        except OSError:  # a file system without locks
            pass
        file.seek(0)
        count, size = find_end(file, args, prompts)
        file.truncate(size)
        yield file.fileno(), count


def seed_of(seed: int, number: int) -> int:
    """The seed of the prompt with this number: its sample doesn't depend on other prompts."""
    return random.Random(f"{seed} {number}").getrandbits(63)


class Answering:
    """How a model answers prompts, as the arguments say."""

    def __init__(
        self, args: argparse.Namespace, model: Trunk, tokenizer: Tokenizer, chat: Any
    ) -> None:
        self.args, self.model, self.tokenizer, self.chat = args, model, tokenizer, chat
        self.options = sampling(args, model) | {"eos_id": tokenizer.eos_ids}
        self.options |= {"compile": args.compile, "cuda_graphs": args.cuda_graphs}
        self.options |= {"speculative": args.speculative}
        self.options |= {"num_draft": args.num_draft}
        # What these must not be is said before the prompts are looked at.
        Sampler(**sampling(args, model))
        if args.speculative:
            most_drafts(model, args.num_draft)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, without any of its answer."""
        return encode(self.args, self.tokenizer, self.chat, prompt)

    def answer(self, prompts: list[Prompt], first: int) -> list[dict[str, Any]]:
        """The records of a batch of prompts, of which the first has this number."""
        ids = [self.encode(prompt) for prompt in prompts]
        texts = [TextStream(self.tokenizer, self.args.stop, prompt) for prompt in ids]
        seeds = [seed_of(self.args.seed, first + i) for i in range(len(prompts))]
        options = self.options | {"seed": seeds, "texts": texts}
        records = []
        news = generate(self.model, ids, self.args.max_new_tokens, **options).tokens
        for prompt, text, new in zip(prompts, texts, news, strict=True):
            ended = text.stopped or new[-1] in self.tokenizer.eos_ids
            figures = {"tokens": len(new), "finish_reason": "stop" if ended else "length"}
            records.append(record(prompt, text.finish()) | figures)
        return records


def write_answers(args: argparse.Namespace, prompts: list[Prompt], load: Load) -> None:
    """Answer the prompts that --output has no answer to yet, and add the answers to it."""
    size, total = args.batch_size or BATCH_SIZE, len(prompts)
    with opened(args, prompts) as (file, done):
        if done:
            print(f"{args.output}: has {done} of {total} answers", file=sys.stderr)
        if done == total:
            return
        model, tokenizer, config = load()
        chat = chat_tokenizer(tokenizer.place) if args.chat else None
        answering = Answering(args, model, tokenizer, chat)
        check_prompts(answering, prompts[done:], size, config)
        begin = told = time.monotonic()
        tokens = 0
        # Batches begin where they would without what is there already: the same answers, to the
        # bit, for how many rows are added up together may change the last bits of a sum.
        for first in range(done - done % size, total, size):
            records = answering.answer(prompts[first : first + size], first)
            add(args.output, file, records[max(0, done - first) :])
            tokens += sum(answer["tokens"] for answer in records)
            now = time.monotonic()
            if now - told > _TOLD_EVERY or first + size >= total:
                told, rate = now, tokens / (now - begin)
                last = min(first + size, total)
                print(f"answered {last} of {total}, {rate:.1f} tokens/s", file=sys.stderr)


def check_prompts(
    answering: Answering, prompts: list[Prompt], size: int, config: JobConfig
) -> None:
    """What can't be answered is said before the first answer; what is long is told."""
    args, model, longest = answering.args, answering.model, 0
    for prompt in prompts:
        ids = answering.encode(prompt)
        check(model, [ids], args.max_new_tokens)
        longest = max(longest, len(ids))
    length = longest + args.max_new_tokens
    what = f"--max_new_tokens {args.max_new_tokens} for --batch_size {size}"
    check_generation(model, what, size, length)
    if length > (seen := config.training.seq_len):
        told = f"note: up to {length} tokens, the model was trained on {seen} at a time"
        print(told, file=sys.stderr)


def add(path: Path, file: int, records: list[dict[str, Any]]) -> None:
    """Lines of a batch, which the disk has when it returns."""
    lines = "".join(json.dumps(answer) + "\n" for answer in records).encode()
    try:
        while lines:
            lines = lines[os.write(file, lines) :]
        os.fsync(file)
    except OSError as error:
        raise UserError(f"--output {path}: can't be written: {error.strerror}") from error
