"""Datasets of the Hugging Face hub, streamed."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from torchtitan_mtp.data.document import Document, to_document
from torchtitan_mtp.data.files import BadRecords
from torchtitan_mtp.errors import UserError, import_optional

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # records at most, for one that is no bad one

# name -> path on the hub, configuration, split
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "c4": ("allenai/c4", "en", "train"),
    "c4_validation": ("allenai/c4", "en", "validation"),
    "fineweb": ("HuggingFaceFW/fineweb", "default", "train"),
}


class StreamSource:
    """A `datasets.IterableDataset` as a source: sequential, in the order it is published.

    Args:
        name: of DATASETS, or "org/name" (its default configuration, split "train").
        text_field: of a record, what holds its text.
        dataset: an object like datasets.IterableDataset to read instead of the hub's.
        bad_records: "stop" at the first record without text, or "skip" them.

    Raises:
        UserError: `datasets` not installed, no network, no such dataset.
    """

    def __init__(
        self, name: str, text_field: str = "text", dataset: Any = None, bad_records: str = "stop"
    ) -> None:
        self.name, self.bad_records = name, bad_records
        self._text_field = text_field
        self.bad = BadRecords(bad_records)
        wanted = path, config, split = DATASETS.get(name, (name, None, "train"))
        self._dataset = _load(name, *wanted) if dataset is None else dataset
        self.num_shards = int(self._dataset.num_shards)
        logger.info("dataset %s: a stream in %d part(s), %s", name, self.num_shards, wanted)
        self.fingerprint = f"hub:{path}:{config}:{split}:{text_field}"

    @functools.cached_property
    def has_conversations(self) -> bool:
        """As of a `Source`, by the types of the columns; by the first document where the dataset
        does not know them."""
        if columns := self._dataset.features:
            usual = columns.get("messages", columns.get("completion"))
            column = columns.get(self._text_field, usual)
            return column is not None and "string" not in getattr(column, "dtype", "")
        records = self._dataset.shard(1, 0)  # a copy: it keeps its place
        with contextlib.suppress(Exception):  # which is told when it is read
            for record in itertools.islice(records, _LOOKED_AT):
                with contextlib.suppress(ValueError):
                    return bool(to_document(record, self._text_field).conversation)
        return False

    def read(
        self, lane: int = 0, num_lanes: int = 1, state: Any = None
    ) -> Iterator[tuple[Any, Document, str]]:
        """A lane's documents, once: of whole files where there is one for each lane, else of every
        `num_lanes`-th record. With each the state before it, plain data with which a later call
        goes on there, and its place, for messages."""
        by_file = num_lanes <= self.num_shards
        # A copy in either case: it keeps its place.
        records = self._dataset.shard(num_lanes, lane) if by_file else self._dataset.shard(1, 0)
        first, step = (0, 1) if by_file else (lane, num_lanes)
        # Until a record is drawn, an IterableDataset's own state is not the one it was given.
        if state is None:
            state = {"number": 0, "records": records.state_dict()}
        else:
            records.load_state_dict(state["records"])
        iterator = iter(records)
        for number in itertools.count(state["number"]):
            where = f"{self.name}: record {number}"
            try:
                record = next(iterator, None)
            except Exception as e:  # whatever the dataset's reader and the network raise
                raise UserError(
                    f"dataset {self.name}: reading record {number} failed: {_told(e)}; resume from"
                    " the last checkpoint, or download the files and give dataset_path"
                ) from e
            if record is None:
                return
            if number % step != first:
                continue
            try:
                document = to_document(record, self._text_field)
            except ValueError as e:
                self.bad.add(where, str(e))
                if self.bad.count == 1:
                    logger.warning("bad records are left out, the first: %s", self.bad.first)
                continue
            yield state, document, where
            state = {"number": number + 1, "records": records.state_dict()}


def _load(name: str, path: str, config: str | None, split: str) -> Any:
    hub = import_optional(
        "datasets",
        f"dataset {name}: streaming it needs the datasets package: pip install datasets; or give"
        " dataset_path local files",
    )
    try:
        return hub.load_dataset(path, name=config, split=split, streaming=True)
    except Exception as e:  # its errors have no common type
        raise UserError(
            f"dataset {name}: can't open {path} on the hub: {_told(e)}; check the name and the"
            " network, or give dataset_path local files"
        ) from e


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
