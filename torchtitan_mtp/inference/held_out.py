"""A text to evaluate on: its documents, its windows, and prompts from it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.corpus import encode_document
from torchtitan_mtp.data.document import SKIPPED, Document
from torchtitan_mtp.data.files import BadRecords
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.mixture import Mixture, parse_entry, source_from_config
from torchtitan_mtp.data.order import split_documents
from torchtitan_mtp.data.sources import Source, find_source, is_path
from torchtitan_mtp.data.targets import Window
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError

WHOLE = {"split": "all", "seed": 0, "validation_fraction": 0.0}


@dataclass(frozen=True)
class Text:
    """Documents of a source: all of them, or those that a run held out."""

    source: Source | StreamSource | Mixture
    split: dict[str, Any]  # split, seed, validation_fraction, as `DataLoader` takes them
    about: str  # for people, which documents these are

    def windows(
        self, tokenizer: Tokenizer, n: int, seq_len: int, batch_size: int
    ) -> Iterable[Window]:
        """One pass, as validation of n heads reads it."""
        return DataLoader(
            self.source, tokenizer, seq_len, n, batch_size, infinite=False, **self.split
        )

    def prompts(self, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
        """`count` pieces of `length` tokens, spread evenly over the documents and, where these are
        fewer, over each of them (of a stream: over its first `count` ones).

        One piece of a document is its middle. A document that is shorter gives itself, once.

        Raises:
            UserError: none has a token.
        """
        documents = list(self._spread(self.source, count))
        first = self.source.sources[0] if isinstance(self.source, Mixture) else self.source
        prompts: list[list[int]] = []
        bad = BadRecords(first.bad_records)
        for j, document in enumerate(documents):
            tokens = tokenizer.prompt(document.prompt + document.text)
            if document.conversation:
                encoded = encode_document(tokenizer, document, lambda: self.about, bad)
                tokens = encoded.tokens.tolist()
            share = count * (j + 1) // len(documents) - count * j // len(documents)
            room = max(0, len(tokens) - length)
            starts = {room * i // (share + 1) for i in range(1, share + 1)}
            prompts += [tokens[start : start + length] for start in sorted(starts) if tokens]
        if not prompts:
            raise UserError(
                f"{self.about}: not a token in {len(documents)} document(s) to begin a prompt with;"
                " ask for more --prompts, or take another --source"
            )
        return prompts

    def _spread(self, source: Source | StreamSource | Mixture, count: int) -> Iterator[Document]:
        if isinstance(source, Mixture):
            total = len(source.sources)
            for i, part in enumerate(source.sources):
                yield from self._spread(part, count * (i + 1) // total - count * i // total)
        elif isinstance(source, StreamSource):
            yield from (document for _, document, _ in itertools.islice(source.read(), count))
        else:
            split, fraction = self.split["split"], self.split["validation_fraction"]
            numbers = split_documents(len(source), split, fraction, self.split["seed"], source.name)
            numbers = numbers[source.sizes()[numbers] != SKIPPED]
            picked = np.linspace(0, len(numbers), min(count, len(numbers)), endpoint=False)
            yield from (source[int(number)] for number in numbers[picked.astype(int)])


def find_text(config: JobConfig, name: str | None) -> Text:
    """What to evaluate a run on.

    name: a dataset, file, folder or glob, all of whose documents are taken; None, or a source
        that the run trained on: what the run validates on, as it was held out. A trained run has a
        seed; without one, as in an imported folder, no text is known to be the training's.

    Raises:
        UserError: nothing there, or nothing that says what was held out.
    """
    training, validation = config.training, config.validation
    mixed = [parse_entry(entry)[1] for entry in training.mixture]
    own = [_real(entry) for entry in mixed or [training.dataset_path or training.dataset]]
    if name is not None and (training.seed is None or _real(name) not in own):
        options = {"text_field": training.text_field, "bad_records": training.bad_records}
        return Text(find_source(name, split="all", key="--source", **options), WHOLE, name)
    other = validation.dataset_path or validation.dataset
    if name is None and other:
        return Text(source_from_config(config, validation), WHOLE, other)
    if training.seed is None:
        raise UserError(
            "--source: config.toml has no training.seed, as of an imported model, so which text it "
            "trained on, and which documents it held out, isn't known; name a text"
        )
    source = source_from_config(config, training)
    about = " and ".join(mixed) or training.dataset_path or training.dataset
    if isinstance(source, Mixture) and name is not None:
        source, about = source.sources[own.index(_real(name))], name
    if not validation.enable or other:
        return Text(source, WHOLE, f"{about}, which the run trained on")
    split = {"seed": training.seed, "validation_fraction": training.validation_fraction}
    return Text(source, split | {"split": "validation"}, f"what the run held out of {about}")


def _real(name: str) -> str:
    """One spelling of every path; a dataset's name as it is."""
    return os.path.realpath(name) if is_path(name) else name
