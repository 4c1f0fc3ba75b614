"""Datasets of the Hugging Face hub, streamed."""

import logging
from typing import Any

from torchtitan_mtp.data.document import Document, document_of
from torchtitan_mtp.data.files import BadRecords
from torchtitan_mtp.errors import UserError, import_optional

logger = logging.getLogger(__name__)


# name -> path on the hub, configuration, split
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "c4": ("allenai/c4", "en", "train"),
    "c4_validation": ("allenai/c4", "en", "validation"),
    "fineweb": ("HuggingFaceFW/fineweb", "default", "train"),
}


class HubStream:
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
        self.name = name
        self.text_field = text_field
        self.bad = BadRecords(bad_records)
        wanted = path, config, split = DATASETS.get(name, (name, None, "train"))
        self._dataset = _load(name, *wanted) if dataset is None else dataset
        self.num_shards = int(self._dataset.num_shards)
        logger.info("dataset %s: a stream in %d part(s), %s", name, self.num_shards, wanted)
        self.fingerprint = f"hub:{path}:{config}:{split}:{text_field}"

    def open_lane(self, lane: int, num_lanes: int, state: Any = None) -> "HubLane":
        """Whole files where there is one for each lane; else every `num_lanes`-th record."""
        if num_lanes <= self.num_shards:
            return HubLane(self, self._dataset.shard(num_lanes, lane), 0, 1, state)
        # A copy of its own: it keeps its place.
        return HubLane(self, self._dataset.shard(1, 0), lane, num_lanes, state)


class HubLane:
    """Records number first, first + step, ... of an IterableDataset."""

    def __init__(self, source: HubStream, records: Any, first: int, step: int, state: Any) -> None:
        self._source = source
        self._records = records
        self._first = first
        self._step = step
        self._number = 0  # of the next record
        # Until a record is drawn, an IterableDataset's own state is not the one it was given.
        self._loaded: Any = None
        if state is not None:
            self._number, self._loaded = state["number"], state["records"]
            records.load_state_dict(self._loaded)
        self._iterator = iter(records)

    def state(self) -> Any:
        place = self._records.state_dict() if self._loaded is None else self._loaded
        return {"number": self._number, "records": place}

    def where(self) -> str:
        return f"{self._source.name}: record {self._number - 1}"

    def __iter__(self) -> "HubLane":
        return self

    def __next__(self) -> Document:
        source = self._source
        while True:
            record = self._next_record()
            if (self._number - 1) % self._step != self._first:
                continue
            if document := document_of(record, source.text_field):
                return document
            source.bad.add(
                self.where(),
                f"expected records with a string {source.text_field!r}, or strings 'prompt' and"
                f" 'completion'; found {sorted(record)}",
            )
            if source.bad.count == 1:
                logger.warning("bad records are left out, the first: %s", source.bad.first)

    def _next_record(self) -> Any:
        try:
            record = next(self._iterator)
        except StopIteration:
            raise
        except Exception as e:  # whatever the dataset's reader and the network raise
            raise UserError(
                f"dataset {self._source.name}: reading record {self._number} failed: {_told(e)};"
                " resume from the last checkpoint, or download the files and give dataset_path"
            ) from e
        self._number += 1
        self._loaded = None
        return record


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
