"""Damage to bytes and to text, drawn from a random generator."""

from __future__ import annotations

import json
import random
from typing import Any

# What is put into text: syntax of TOML and JSON, values of every type, and bytes that are no text.
PIECES = [
    *(bytes([byte]) for byte in b"\"'[]{}=:,\n#.\\\0\xff"),
    *(b"true", b"null", b"-1", b"0", b"1.5", b"1e999", b"nan", b"inf", b'""', b"[]", b"{}"),
    *(b"9" * 30, b'"\\ud800"', b"1979-05-27", b"[mtp]\n", b"../x", b"\xed\xa0\x80"),
]

# Of every JSON type, and beyond those that numbers fit.
VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 1.5, 2**30, 2**40, 1e400, 10**400),
    *("", "abc", [], [1], {}, {"a": 1}),
]


def damaged(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """`content` after one to three accidents: bits, bytes, spans, the end, or `other`'s bytes."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(_ACCIDENTS)(bytearray(content), rng, other)
    return bytes(content)


def edited(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to four spans deleted, replaced by pieces of syntax, or repeated."""
    for _ in range(rng.randint(1, 4)):
        start, stop = _span(content, rng, 30)
        piece = rng.choice(
            [b"", rng.choice(PIECES), rng.randbytes(rng.randint(1, 4)), content[start:stop] * 2]
        )
        content = content[:start] + piece + content[stop:]
    return content


def retyped(content: bytes, rng: random.Random) -> bytes:
    """A JSON object or list in which one value, at any depth, is another, of any type."""
    whole = place = json.loads(content)
    while True:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.5:
            place[key] = rng.choice(VALUES)
            return json.dumps(whole).encode()
        place = place[key]


def _span(content: bytes | bytearray, rng: random.Random, longest: int) -> tuple[int, int]:
    start = rng.randint(0, len(content))
    return start, min(len(content), start + rng.randint(0, longest))


def _flip(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    for _ in range(rng.randint(1, 8)):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def _set_bytes(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    start, stop = _span(content, rng, 8)
    content[start:stop] = rng.choice([b"\xff", b"\0", b"\x7f", b"\x80"]) * (stop - start)
    return content


def _zero_page(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    start, stop = _span(content, rng, 4096)
    content[start:stop] = bytes(stop - start)
    return content


def _truncate(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    return content[: rng.randint(0, len(content))]


def _delete(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    start, stop = _span(content, rng, 64)
    del content[start:stop]
    return content


def _insert(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    start = rng.randint(0, len(content))
    content[start:start] = rng.randbytes(rng.randint(1, 64))
    return content


def _swap(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    (a, b), (c, d) = sorted([_span(content, rng, 512), _span(content, rng, 512)])
    return content[:a] + content[c:d] + content[max(a, b) : c] + content[a:b] + content[d:]


def _splice(content: bytearray, rng: random.Random, other: bytes) -> bytearray:
    start, stop = _span(other, rng, 2048)
    at = rng.randint(0, len(content))
    content[at : at + stop - start] = other[start:stop]
    return content


_ACCIDENTS = [_flip, _set_bytes, _zero_page, _truncate, _delete, _insert, _swap, _splice]
