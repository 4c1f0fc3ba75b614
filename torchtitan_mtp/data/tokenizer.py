"""Tokenizers: bytes, tiktoken's files (Llama 3's is one) and Hugging Face's tokenizer.json."""

import base64
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken

from torchtitan_mtp.data.special_tokens import SpecialIds, read_special_tokens
from torchtitan_mtp.errors import UserError, hub_hint, looked_in, reading

logger = logging.getLogger(__name__)

Frame = tuple[tuple[int, ...], int]  # what is put before a document, and after it
LLAMA3_RANKS = 128_000
# How Llama 3 (Meta's llama3/tokenizer.py) and scripts/train_tokenizer.py cut text before merging.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
# What ends a document where no file says it.
_ENDS = (END_OF_TEXT, "</s>", "<|endoftext|>", "<eos>", "<|im_end|>")
_NO_TOKENIZER = (
    'model.hf_assets_path = "": the model has no tokenizer; name a folder or file of one'
)
_CONVERT = (
    ", which is not read here: write a tokenizer.json beside it with transformers:"
    " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


class Tokenizer:
    """Text to ids and back, and the special tokens."""

    vocab_size: int  # one more than the largest id that it can return, special tokens included
    prefix: tuple[int, ...]  # put before a document or a prompt; may be empty
    eos_id: int  # put after a document
    eos_ids: tuple[int, ...]  # each of them ends decoding
    bos_id: int | None
    pad_id: int | None
    place: str  # the model's folder, which has a chat template or not
    of_text: str  # equal for two tokenizers that give a text the same ids
    usual_frame: Frame | None = None  # which the fingerprint leaves out

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of the text, [T] int32. special: what spells a special token is that token, and no
        text as any other."""
        raise NotImplementedError

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the text, [T] int32, special tokens as such, and the characters that each stands
        for, [T, 2]: start and stop. Of tokenizers that can have a chat template."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. Ids that stand for no text
        (special tokens, a padded vocabulary's) leave nothing."""
        raise NotImplementedError

    def prompt(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text to continue, after a prefix that it does not spell itself."""
        ids = self.encode(text, special).tolist()
        begun = special and tuple(ids[: len(self.prefix)]) == self.prefix
        return ids if begun else [*self.prefix, *ids]

    def set_special(self, ids: SpecialIds, prefix: tuple[int, ...]) -> None:
        assert ids.eos is not None
        self.bos_id, self.eos_id, self.eos_ids, self.pad_id = ids.bos, ids.eos, ids.ends, ids.pad
        self.prefix = prefix
        self.vocab_size = max(self.vocab_size, 1 + max((ids.eos, *prefix)))

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that give documents the same ids."""
        if (self.prefix, self.eos_id) == self.usual_frame:
            return self.of_text
        return f"{self.of_text}:{','.join(map(str, self.prefix))}:{self.eos_id}"

    def resume_as(self, fingerprint: str) -> bool:
        """Frame documents as the tokenizer with this fingerprint did, of an earlier version or of
        files that have changed since; False: it gave texts other ids."""
        frame = self.usual_frame if fingerprint == self.of_text else None
        if said := re.fullmatch(r":([\d,]*):(\d+)", fingerprint.removeprefix(self.of_text)):
            frame = tuple(map(int, re.findall(r"\d+", said[1]))), int(said[2])
        if frame and fingerprint != self.fingerprint:
            self.prefix, self.eos_id = frame
            around = f"{list(self.prefix)} in front and {self.eos_id} at the end, as the run began"
            logger.warning("documents go on with %s: the tokenizer's files say otherwise", around)
        return fingerprint == self.fingerprint


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: ids 0-255 are bytes, then bos, eos and pad. Needs no file."""

    vocab_size = 259
    prefix = (256,)
    bos_id = 256
    eos_id = 257
    eos_ids = (257,)
    pad_id = 258
    place = of_text = "byte"
    usual_frame = (256,), 257
    ranks: Mapping[bytes, int] = {bytes([i]): i for i in range(256)}
    specials: Mapping[str, int] = {BEGIN_OF_TEXT: 256, END_OF_TEXT: 257, "<|pad|>": 258}

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        if special:
            return _with_specials(text, self.specials, self.encode)
        # A lone surrogate (JSON can spell one) has no UTF-8; "?" stands for it.
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class NoTokenizer(Tokenizer):
    """Of a model that came without one: text is refused, ids are not."""

    vocab_size, prefix, eos_id, eos_ids, place, of_text = 0, (), -1, (), "none", "none"

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        raise UserError(_NO_TOKENIZER)


class TiktokenTokenizer(Tokenizer):
    """Byte-pair ranks in tiktoken's file format, cut by Llama 3's pattern.

    A file of 128,000 ranks is Llama 3's and gets its 256 special tokens (vocabulary 128,256); any
    other gets <|begin_of_text|> and <|end_of_text|> after its ranks.

    Args:
        path: lines of "BASE64 RANK", ranks 0, 1, 2, ... in any order.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        data = _read(path)
        self.ranks = _parse_ranks(path, data)
        self.num_ranks = len(self.ranks)
        self.specials = _special_tokens(self.num_ranks)
        self.vocab_size = self.num_ranks + len(self.specials)
        self.place = str(model_folder(path))
        said = read_special_tokens(model_folder(path))
        ids = said.resolve(self.specials.get, BEGIN_OF_TEXT, END_OF_TEXT)
        prefix = () if ids.bos is None else (ids.bos,)
        self.of_text = f"tiktoken:{hashlib.sha256(data).hexdigest()}"
        self.usual_frame = (self.num_ranks,), self.num_ranks + 1
        self.set_special(ids, prefix)

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "ranks",
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=dict(self.ranks),
            special_tokens=dict(self.specials),
        )

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        if special and self.specials:
            return _with_specials(text, self.specials, self.encode)
        encode = self._encoding.encode_ordinary
        return np.concatenate([np.array(encode(part), np.int32) for part in _parts(text)])

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text, special=True)
        _, starts = self._encoding.decode_with_offsets(ids.tolist())
        stops = np.maximum([*starts[1:], len(text)], np.add(starts, 1))  # a byte's is its character
        return ids, np.stack([starts, stops], axis=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i for i in map(int, ids) if 0 <= i < self.num_ranks])


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, and the special tokens that it and the files beside it name.
    The prefix is what its post-processor puts in front of a text."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        data = _read(path).removeprefix(codecs.BOM_UTF8)
        self.place = str(path.parent)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as e:  # tokenizers raises bare Exception
            wrong = f"not a readable tokenizer.json: {e}"
            if path.name == "vocab.json":
                wrong = f"a vocabulary alone{_CONVERT}"
            raise UserError(f"tokenizer {path}: {wrong}") from e
        # What the file says of the lengths of a model's inputs is not for documents.
        pad = (self._tokenizer.padding or {}).get("pad_token")
        cut = self._tokenizer.truncation or pad is not None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._one_way = threading.Lock()  # a loader's threads encode texts and conversations
        found = read_special_tokens(path.parent, b'"ByteLevel"' in data, pad)
        vocab, own = self._tokenizer.get_vocab(), self._tokenizer.get_added_tokens_decoder()
        known = {token.content for token in own.values()}
        new = {text: special for text, special in found.tokens.items() if text not in known}
        self._tokenizer.add_tokens([AddedToken(text, special=s) for text, s in new.items()])
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items()}
        ends = [text for text in _ENDS if text in known] or _ENDS  # Gemma's </s> is HTML's
        ids = found.resolve(self._tokenizer.token_to_id, "", *ends)
        if ids.eos is None:
            raise UserError(
                f"tokenizer {path}: no end-of-text token found; name one as eos_token in"
                f" {path.parent / 'tokenizer_config.json'}"
            )
        a = self._tokenizer.encode("a")
        marked = zip(a.ids, a.special_tokens_mask, strict=True)
        prefix = tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], marked))
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # ids may have gaps
        self.of_text = f"hf:{hashlib.sha256(data).hexdigest()}"
        more = [text for text in new if text not in vocab and text not in found.later]
        if cut or more:  # earlier versions cut texts, and had no such tokens
            self.of_text += f":{':'.join(more) or 'whole'}"
        self.set_special(ids, prefix)

    def has_same_ids(self, ranks: TiktokenTokenizer) -> bool:
        """Whether the two are of one model, by the number of tokens and the pattern that cuts."""
        cut, size = self._tokenizer.pre_tokenizer, self._tokenizer.get_vocab_size(False)
        pattern = json.dumps(LLAMA3_PATTERN).encode()
        return size == ranks.num_ranks and cut is not None and pattern in cut.__getstate__()

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        return np.array(self._encode(text, special).ids, np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._encode(text, special=True)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets).reshape(-1, 2)

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        # A lone surrogate (JSON can spell one) has no UTF-8; "?" stands for it.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        with self._one_way:
            self._tokenizer.encode_special_tokens = not special
            return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))


def model_folder(path: Path) -> Path:
    """The model's folder that a tokenizer's file is of; Meta's lie in original/."""
    return path.parent.parent if path.parent.name == "original" else path.parent


def build_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that `path` names: the word "byte", a file, or a folder.

    In a folder tokenizer.json rules; tokenizer.model, original/tokenizer.model or *.tiktoken is
    read where there is none, and as the faster way to the same ids.

    Raises:
        UserError: nothing there, or a file that is not a tokenizer of these kinds.
    """
    if path == "byte":
        return ByteTokenizer()
    if not path:
        raise UserError(_NO_TOKENIZER)
    place = Path(path).expanduser()
    if place.is_file():
        return HFTokenizer(place) if place.suffix == ".json" else TiktokenTokenizer(place)
    if not place.is_dir():
        raise UserError(
            f"tokenizer {path}: no such file or folder (model.hf_assets_path; or the word byte)"
            f"{looked_in(place)}{hub_hint(path)}"
        )
    file = place / "tokenizer.json"
    hf = HFTokenizer(file) if file.is_file() else None
    names = ("tokenizer.model", "original/tokenizer.model", "*.tiktoken", "*.model")
    for file in (file for name in names for file in sorted(place.glob(name))):
        if hf is None and file.is_file():
            return TiktokenTokenizer(file)
        with contextlib.suppress(UserError):  # a SentencePiece model beside a tokenizer.json
            if hf is not None and hf.has_same_ids(ranks := TiktokenTokenizer(file)):
                ids = SpecialIds(hf.bos_id, hf.eos_id, hf.eos_ids, hf.pad_id)
                ranks.set_special(ids, hf.prefix)
                ranks.specials = hf.specials
                ranks.vocab_size = max(ranks.vocab_size, hf.vocab_size)
                return ranks
    if hf is not None:
        return hf
    if (place / "vocab.json").is_file():
        raise UserError(f"tokenizer {path}: the folder holds vocab.json{_CONVERT}")
    raise UserError(
        f"tokenizer {path}: the folder holds none of tokenizer.json, tokenizer.model,"
        " original/tokenizer.model, *.tiktoken"
    )


def _with_specials(
    text: str, specials: Mapping[str, int], encode: Callable[[str], np.ndarray]
) -> np.ndarray:
    """Ids of the text, [T] int32, in which what spells a special token is that token."""
    either = "|".join(map(re.escape, sorted(specials, reverse=True)))  # before its beginnings
    parts = re.split(f"({either})", text)
    return np.concatenate(
        [[specials[part]] if part in specials else encode(part) for part in parts]
    ).astype(np.int32)


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
    with reading(f"tokenizer {path}"):
        return path.read_bytes()


def _parse_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    # Not tiktoken.load.load_tiktoken_bpe: it caches local files by path in a temp folder and goes
    # on returning the old ranks after the file has changed.
    if data.startswith(b"\n"):  # as a message of pieces does
        raise UserError(f"tokenizer {path}: a SentencePiece model{_CONVERT}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            token, value = base64.b64decode(word, validate=True), int(rank)
        except ValueError:
            raise UserError(
                f"tokenizer {path}:{number}: expected a base64 token and its rank, found"
                f" {line[:40]!r}"
            ) from None
        if token in ranks:
            raise UserError(f"tokenizer {path}:{number}: token {token!r} has a rank already")
        ranks[token] = value
    wrong, missing = "", [b for b in range(256) if bytes([b]) not in ranks]
    if not ranks:
        wrong = "the file is empty; expected base64 tokens and ranks"
    elif sorted(ranks.values()) != list(range(len(ranks))):
        wrong = f"{len(ranks)} ranks must be 0 to {len(ranks) - 1}, each once"
    elif missing:
        wrong = f"no token for byte {missing[0]}; all 256 bytes need one"
    if wrong:
        raise UserError(f"tokenizer {path}: {wrong}")
    return ranks


def _special_tokens(num_ranks: int) -> dict[str, int]:
    names = [BEGIN_OF_TEXT, END_OF_TEXT]
    if num_ranks == LLAMA3_RANKS:  # Meta's llama3/tokenizer.py
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
        header = ["<|start_header_id|>", "<|end_header_id|>", reserved[4], "<|eot_id|>"]
        names += [*reserved[:4], *header, *reserved[5:]]
    return {name: num_ranks + i for i, name in enumerate(names)}
