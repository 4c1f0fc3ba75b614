"""Tokenizers: bytes, tiktoken's files (Llama 3's is one) and Hugging Face's tokenizer.json."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torchtitan_mtp.errors import UserError

LLAMA3_RANKS = 128_000
# How Llama 3 (Meta's llama3/tokenizer.py) and scripts/train_tokenizer.py cut text before merging.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: one more than the largest id it can return, special tokens included.
        bos_id: put before a document.
        eos_id: put after a document.
        fingerprint: equal for two tokenizers that give the same ids.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, [T] int32, with no special token, whatever the text spells."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. Ids that stand for no text
        (special tokens, a padded vocabulary's) leave nothing."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8: ids 0-255 are bytes, then bos, eos and pad. Needs no file."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        # A lone surrogate (JSON can spell one) has no UTF-8; "?" stands for it.
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(
            np.int32
        )

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class TiktokenTokenizer:
    """Byte-pair ranks in tiktoken's file format, cut by Llama 3's pattern.

    A file of 128,000 ranks is Llama 3's and gets its 256 special tokens (vocabulary 128,256); any
    other gets <|begin_of_text|> and <|end_of_text|> after its ranks.

    Args:
        path: lines of "BASE64 RANK", ranks 0, 1, 2, ... in any order.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import tiktoken
        except ImportError as e:
            raise UserError(
                f"tokenizer {path}: reading it needs tiktoken: pip install tiktoken"
            ) from e
        data = _read(Path(path))
        ranks = _parse_ranks(Path(path), data)
        specials = _special_tokens(len(ranks))
        self._encoding = tiktoken.Encoding(
            name=Path(path).name,
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=specials,
        )
        self._num_ranks = len(ranks)
        self.vocab_size = len(ranks) + len(specials)
        self.bos_id = specials[BEGIN_OF_TEXT]
        self.eos_id = specials[END_OF_TEXT]
        self.fingerprint = f"tiktoken:{hashlib.sha256(data).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        parts = [self._encoding.encode_ordinary(part) for part in _parts(text)]
        return np.concatenate([np.array(ids, dtype=np.int32) for ids in parts])

    def decode(self, ids: Sequence[int]) -> str:
        text = [i for i in map(int, ids) if 0 <= i < self._num_ranks]
        return self._encoding.decode_bytes(text).decode("utf-8", errors="replace")


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, with bos and eos named by the `tokenizer_config.json` beside
    it where there is one. A model without a bos token gets eos before its documents as well."""

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as e:
            raise UserError(
                f"tokenizer {path}: reading it needs tokenizers: pip install tokenizers"
            ) from e
        path = Path(path)
        data = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as e:  # tokenizers raises bare Exception
            raise UserError(f"tokenizer {path}: not a readable tokenizer.json: {_line(e)}") from e
        # Text that happens to spell a special token is text.
        self._tokenizer.encode_special_tokens = True
        # What the file says of the lengths of a model's inputs is not for documents.
        cut = self._tokenizer.truncation or self._tokenizer.padding
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps
        named = _named_specials(path.parent / "tokenizer_config.json")
        eos = _first_known(
            vocab,
            [
                named.get("eos_token"),
                END_OF_TEXT,
                "</s>",
                "<|endoftext|>",
                "<eos>",
                "<|im_end|>",
            ],
        )
        if eos is None:
            raise UserError(
                f"tokenizer {path}: no end-of-text token found; name one as eos_token in"
                f" {path.parent / 'tokenizer_config.json'}"
            )
        bos = _first_known(vocab, [named.get("bos_token"), BEGIN_OF_TEXT, "<s>", "<bos>"])
        self.eos_id = eos
        self.bos_id = eos if bos is None else bos
        self.fingerprint = f"hf:{hashlib.sha256(data).hexdigest()}:{self.bos_id}:{self.eos_id}"
        if cut:  # earlier versions applied them: other ids
            self.fingerprint += ":whole"

    def encode(self, text: str) -> np.ndarray:
        # A lone surrogate (JSON can spell one) has no UTF-8; "?" stands for it.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))


def build_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that `path` names: the word "byte", a file, or a folder that holds one of
    tokenizer.model, original/tokenizer.model, *.tiktoken, tokenizer.json (in this order).

    Raises:
        UserError: nothing there, or a file that is not a tokenizer of these kinds.
    """
    if path == "byte":
        return ByteTokenizer()
    place = Path(path)
    if place.is_file():
        return HFTokenizer(place) if place.suffix == ".json" else TiktokenTokenizer(place)
    if not place.is_dir():
        raise UserError(
            f"tokenizer {path}: no such file or folder; give one, or the word byte"
            " (model.hf_assets_path)"
        )
    hf = place / "tokenizer.json"
    tiktokens = [place / "tokenizer.model", place / "original" / "tokenizer.model"]
    for file in tiktokens + sorted(place.glob("*.tiktoken")):
        # A SentencePiece tokenizer.model is passed over where a tokenizer.json says the same.
        if file.is_file() and (not hf.is_file() or _starts_like_ranks(file)):
            return TiktokenTokenizer(file)
    if hf.is_file():
        return HFTokenizer(hf)
    raise UserError(
        f"tokenizer {path}: the folder holds none of tokenizer.model, original/tokenizer.model,"
        " *.tiktoken, tokenizer.json"
    )


# Meta's TIKTOKEN_MAX_ENCODE_CHARS and MAX_NO_WHITESPACES_CHARS: beyond them tiktoken may panic.
_MOST_CHARS, _MOST_ALIKE = 400_000, 25_000
_SPACE, _OTHER = re.compile(r"\s*"), re.compile(r"\S*")


def _parts(text: str) -> Iterator[str]:
    """The text, cut as Meta's llama3/tokenizer.py cuts it: every 400,000 characters, and within
    these every 25,000 characters of a run of white space or of anything else."""
    for start in range(0, max(1, len(text)), _MOST_CHARS):
        part, begin, end = text[start : start + _MOST_CHARS], 0, 0
        for at in range(_MOST_ALIKE, len(part), _MOST_ALIKE):  # a longer run has one of these
            if at >= end:
                alike = _SPACE if part[at].isspace() else _OTHER
                end = alike.match(part, at).end()  # type: ignore[union-attr]
                before = alike.match(part[at - _MOST_ALIKE : at][::-1]).end()  # type: ignore[union-attr]
                for cut in range(at - before + _MOST_ALIKE, end, _MOST_ALIKE):
                    yield part[begin:cut]
                    begin = cut
        yield part[begin:]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"tokenizer {path}: can't be read: {e.strerror}") from e


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


_RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]+)\s*")


def _starts_like_ranks(path: Path) -> bool:
    with open(path, "rb") as f:
        return _RANK_LINE.fullmatch(f.readline(4096)) is not None


def _parse_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    # Not tiktoken.load.load_tiktoken_bpe: it caches local files by path in a temp folder and goes
    # on returning the old ranks after the file has changed.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        match = _RANK_LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else None
        except binascii.Error:
            token = None
        if match is None or token is None:
            hint = "; SentencePiece models are not read, a tokenizer.json is" if number == 1 else ""
            raise UserError(
                f"tokenizer {path}:{number}: expected a base64 token and its rank, found"
                f" {line[:40]!r}{hint}"
            )
        if token in ranks:
            raise UserError(f"tokenizer {path}:{number}: token {token!r} has a rank already")
        ranks[token] = int(match[2])
    if not ranks:
        raise UserError(f"tokenizer {path}: the file is empty; expected base64 tokens and ranks")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"tokenizer {path}: {len(ranks)} ranks must be 0 to {len(ranks) - 1}, each once"
        )
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"tokenizer {path}: no token for byte {missing[0]}; all 256 bytes need one")
    return ranks


def _special_tokens(num_ranks: int) -> dict[str, int]:
    names = [BEGIN_OF_TEXT, END_OF_TEXT]
    if num_ranks == LLAMA3_RANKS:  # Meta's llama3/tokenizer.py
        names += [f"<|reserved_special_token_{i}|>" for i in range(4)]
        names += [
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|reserved_special_token_4|>",
        ]
        names += ["<|eot_id|>"]
        names += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    return {name: num_ranks + i for i, name in enumerate(names)}


def _named_specials(config: Path) -> dict[str, str]:
    """bos_token and eos_token of a tokenizer_config.json, where it has them."""
    if not config.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(_read(config))
        found = {key: values.get(key) for key in ("bos_token", "eos_token")}
    except (ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{config}: not a JSON object: {_line(e)}") from e
    named = {}
    for key, value in found.items():
        # A token is a string, or an object that holds it as "content".
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str | None):
            raise UserError(f"{config}: {key} = {value!r}, expected a token")
        if token:
            named[key] = token
    return named


def _first_known(vocab: dict[str, int], names: Sequence[str | None]) -> int | None:
    return next((vocab[name] for name in names if name is not None and name in vocab), None)
