"""Train a byte-level BPE tokenizer on a source and write it in tiktoken's format."""

import argparse
import base64
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torchtitan_mtp.cli.arguments import path
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.sources import Source, find_source
from torchtitan_mtp.data.tokenizer import LLAMA3_PATTERN, TiktokenTokenizer
from torchtitan_mtp.distributed.memory import check_memory
from torchtitan_mtp.errors import UserError, writing
from torchtitan_mtp.writing import written_whole

NUM_SPECIALS = 2  # begin and end of text, which the file does not hold
CHECKED_DOCUMENTS = 64


def main() -> None:
    """SystemExit with one line that says what is wrong, and status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source",
        type=os.path.expanduser,
        default="python_stdlib",
        help="a dataset's name (python_stdlib), a file, a folder or a glob",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        required=True,
        help="ids in all: the file's tokens and two special ones (begin and end of text)",
    )
    parser.add_argument("--output", type=path, required=True, help="file to write, NAME.tiktoken")
    args = parser.parse_args()
    try:
        train(args.source, args.vocab_size, args.output)
    except UserError as e:
        sys.exit(f"error: {e}")


def train(source_name: str, vocab_size: int, output: Path) -> None:
    """Train on every document of a source, write `output`, read it back and compare.

    Raises:
        UserError: a vocabulary too small for the bytes or too large for the text, a source that
            is unreadable or has no text, an output that can't be written.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 256 + NUM_SPECIALS:
        raise UserError(
            f"--vocab_size {vocab_size}: the 256 bytes and {NUM_SPECIALS} special tokens need at"
            f" least {256 + NUM_SPECIALS}"
        )
    # The trainer makes room for all of them at once, at the least a string's three words each.
    check_memory({f"--vocab_size {vocab_size}": 24 * vocab_size}, torch.device("cpu"))
    source = open_source(source_name)
    if not any(documents(source)):
        raise UserError(f"--source {source_name}: no document has any text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    begin = time.perf_counter()
    tokenizer.train_from_iterator(documents(source), trainer)
    seconds = time.perf_counter() - begin
    found = tokenizer.get_vocab_size()
    if found + NUM_SPECIALS != vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size}: the text of {source_name} only makes"
            f" {found + NUM_SPECIALS}; ask for that or give more text"
        )
    write_tiktoken(tokenizer.get_vocab(), output)
    num_bytes, num_tokens = verify(TiktokenTokenizer(output), tokenizer, source)
    print(f"wrote {output}: vocabulary {vocab_size}, trained in {seconds:.1f} s on {source_name}")
    if num_tokens:
        ratio = num_bytes / num_tokens
        print(f"{ratio:.3f} bytes per token in {num_tokens} tokens read back")


def open_source(name: str) -> Source:
    """A named dataset, or the files at a path."""
    source = find_source(name, key="--source")
    if isinstance(source, StreamSource):
        raise UserError(f"--source {name}: a stream has no end; download files and give their path")
    if source.has_conversations:
        raise UserError(f"--source {name}: conversations, which a template spells; give texts")
    return source


def documents(source: Source) -> Iterator[str]:
    """Its texts, and what some of them answer."""
    for i in range(len(source)):
        yield source[i].prompt
        yield source[i].text


def write_tiktoken(vocab: dict[str, int], output: Path) -> None:
    """Lines "BASE64 RANK" of a byte-level vocabulary; a token's rank is its id."""
    to_byte = {char: byte for byte, char in byte_characters().items()}
    lines = [
        base64.b64encode(bytes(to_byte[char] for char in token)) + b" %d\n" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    ]
    with writing(f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(output) as file:
            file.write_bytes(b"".join(lines))


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's
    bytes_to_unicode): its own where it has one, else the next free one from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def verify(written: TiktokenTokenizer, trained: Any, source: Source) -> tuple[int, int]:
    """Bytes and tokens of documents spread over the source, having checked that the file as read
    back gives the trained ids and that the ids give back the text."""
    num_bytes = num_tokens = 0
    step = max(1, len(source) // CHECKED_DOCUMENTS)
    for i in range(0, len(source), step):
        text = source[i].prompt + source[i].text
        ids = written.encode(text).tolist()
        expected = trained.encode(text).ids
        if ids != expected or written.decode(ids) != text:
            raise UserError(f"{source.name}, document {i}: the ids or the text read back differ")
        num_bytes += len(text.encode())
        num_tokens += len(ids)
    return num_bytes, num_tokens


if __name__ == "__main__":
    main()
