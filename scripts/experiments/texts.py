"""Texts made by rule, of which a small model can learn in minutes what it takes a large one to
learn of the web: names that come again, and polynomials."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# ------------------------------------------------------------------- names

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_PAIRS = list(zip(_SYLLABLES, _SYLLABLES[9:], strict=False))
FIRST = [(a + b).capitalize() for a, b in _PAIRS[:24]]
SECOND = [f"{a}{b}son".capitalize() for a, b in _PAIRS[24:48]]
# fmt: off
VERBS = (
    "saw", "met", "asked", "told", "heard", "followed", "found", "left", "helped", "thanked",
    "called", "trusted",
)
THINGS = (
    "house", "river", "garden", "letter", "market", "horse", "bridge", "song", "lamp", "window",
    "boat", "road",
)
# fmt: on
WORDS = [*FIRST, *SECOND, *VERBS, *THINGS, "the", "."]


def story(rng: random.Random, sentences: int = 12, people: int = 3) -> Record:
    """A story about some people, each of a first and a second name that have nothing to do with
    each other: the second is known only to who has read the story.

    "text": words with spaces between; "first" and "again": the places among them of second names,
    where they are mentioned for the first time, and later.
    """
    firsts, seconds = rng.sample(FIRST, people), rng.sample(SECOND, people)
    words: list[str] = []
    places: dict[str, list[int]] = {"first": [], "again": []}
    known: set[int] = set()

    def mention(who: int) -> None:
        words.extend((firsts[who], seconds[who]))
        places["again" if who in known else "first"].append(len(words) - 1)
        known.add(who)

    for _ in range(sentences):
        someone, other = rng.sample(range(people), 2)
        mention(someone)
        words.append(rng.choice(VERBS))
        if rng.random() < 0.5:
            mention(other)
        else:
            words.extend(("the", rng.choice(THINGS)))
        words.append(".")
    return {"text": " ".join(words), **places}


def write_word_tokenizer(folder: Path) -> None:
    """A tokenizer of WORDS, one token each, and an end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    ids = {word: i for i, word in enumerate(["<|endoftext|>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


# ------------------------------------------------------------- polynomials

P = 7
Polynomial = tuple[int, ...]


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    """Their product modulo X^len(a), over F7."""
    found = [0] * len(a)
    for i, x in enumerate(a):
        for j, y in enumerate(b[: len(a) - i]):
            found[i + j] = (found[i + j] + x * y) % P
    return tuple(found)


def plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple((x + y) % P for x, y in zip(a, b, strict=True))


def after(a: Polynomial, b: Polynomial) -> Polynomial:
    """a(b(X)) modulo X^len(a), over F7, by Horner's rule."""
    found = (0,) * len(a)
    for x in reversed(a):
        found = plus(times(found, b), (x, *(0,) * (len(a) - 1)))
    return found


OPERATORS: dict[str, Callable[[Polynomial, Polynomial], Polynomial]] = {
    "+": plus,
    "*": times,
    "o": after,
}


def expression(rng: random.Random, operations: int, degree: int) -> tuple[str, Polynomial]:
    """An expression of so many operations over polynomials modulo X^degree, and its value. Each is
    a negation one time in four; else a binary one, whose other operations fall on both sides."""
    if not operations:
        value = tuple(rng.randrange(P) for _ in range(degree))
        return "".join(map(str, value)), value
    if rng.random() < 0.25:
        text, value = expression(rng, operations - 1, degree)
        return f"-{text}", tuple(-x % P for x in value)
    left = rng.randrange(operations)
    a, x = expression(rng, left, degree)
    b, y = expression(rng, operations - 1 - left, degree)
    name = rng.choice(list(OPERATORS))
    return f"({a}{name}{b})", OPERATORS[name](x, y)


def polynomial_task(rng: random.Random, operations: int, degree: int, pauses: int) -> Record:
    """ "prompt": an expression and "=", and pause tokens; "completion": its coefficients."""
    text, value = expression(rng, operations, degree)
    return {"prompt": f"{text}={'_' * pauses}", "completion": "".join(map(str, value))}


# ------------------------------------------------------------------- files


def records(make: Callable[[random.Random], Record], count: int, seed: int) -> Iterator[Record]:
    """So many records of a generator of its own."""
    rng = random.Random(seed)
    return (make(rng) for _ in range(count))


def write_records(path: Path, found: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in found)
