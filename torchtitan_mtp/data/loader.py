"""Windows of tokens for every data rank, in one global order that no world size changes.

The token stream of a run is V lanes, V fixed when the run begins: each reads an equal stretch of
every epoch (walks.py, corpus.py), and cuts it into windows (lanes.py). Window g of the run is the
next window of lane g mod V, and a step whose global batch is B windows trains on windows
t*B .. (t+1)*B - 1. With several sources (mixture.py) every lane has a stretch of each, and lane and
window decide which of them it comes from.

Data rank r of R, where R divides V, makes the windows with g mod R = r, which come from the lanes
with l mod R = r. The position of a run is V, the next g, and for each lane and source its document
and token: a few hundred bytes, exact at any window, and the same whatever R was, so a run continues
on any R that divides V with the same global batches.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from torchtitan_mtp.data.corpus import Corpus
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.lanes import Lane, LaneWindow
from torchtitan_mtp.data.mixture import Mixture
from torchtitan_mtp.data.order import split_documents
from torchtitan_mtp.data.prefetch import Prefetcher
from torchtitan_mtp.data.sources import Source
from torchtitan_mtp.data.targets import PADDING, Window
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.data.walks import DealtDocuments, Position, Stretches, once, stream_share
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

NUM_LANES = 64  # divisible by every power of two up to it: most numbers of data ranks
STATE_VERSION = 2
DEALT_DOCUMENTS = 1  # version of states whose lanes were dealt whole documents, and go on so
_CAUSES = {
    "source": "training.dataset, dataset_path or mixture, text_field and the files as they were (a"
    " folder's files that are now left out are read through a glob, FOLDER/**/*.*), or go on at the"
    " same place in other files with --training.accept_changed_data",
    "tokenizer": "model.hf_assets_path and its files as they were",
    "documents": "as many documents as there were",
    "seed": "training.seed",
    "held_out": "validation.enable, validation.dataset and training.validation_fraction",
}

State = dict[str, Any]


class DataLoader:
    """Windows [local_batch_size, S+n] for one data rank.

    Args:
        source: the documents, or a mixture of several sources of them.
        tokenizer: makes their tokens.
        seq_len: S, tokens of input in a window.
        num_future_tokens: n, tokens of lookahead.
        local_batch_size: windows in a micro-batch of this rank.
        dp_rank: this data rank; ranks that share their data (tensor, context) pass the same.
        dp_world: number of data ranks.
        seed: of the order of documents and of the split.
        split: "train", "validation" (the documents held out) or "all"; see `split_documents`.
        validation_fraction: share of documents held out, in [0, 1).
        infinite: True: epoch after epoch. False: iterating makes one pass over the split in its
            own order, the same windows whatever the world size; every rank yields the same number
            of micro-batches, the last filled with padding.
        prefetch: windows kept ready by a background thread (infinite only); 0 for no thread.
        accept_changed_data: a state of other files is taken, where there are as many documents.

    Raises:
        UserError: no document to hold out.
    """

    def __init__(
        self,
        source: Source | StreamSource | Mixture,
        tokenizer: Tokenizer,
        seq_len: int,
        num_future_tokens: int,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_world: int = 1,
        *,
        seed: int = 0,
        split: str = "train",
        validation_fraction: float = 0.05,
        infinite: bool = True,
        prefetch: int = 2,
        accept_changed_data: bool = False,
    ) -> None:
        if seq_len < 1 or num_future_tokens < 1 or local_batch_size < 1:
            raise ValueError("seq_len, num_future_tokens and local_batch_size must be positive")
        if not 0 <= dp_rank < dp_world:
            raise ValueError(f"data rank {dp_rank} of {dp_world}")
        self._mixture = source if isinstance(source, Mixture) else Mixture([source])
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._lookahead = num_future_tokens
        self._batch_size = local_batch_size
        self._rank = dp_rank
        self._world = dp_world
        self._seed = seed
        self._depth = prefetch
        self._accept_changed_data = accept_changed_data
        self._prefetcher: Prefetcher[tuple[Window, State]] | None = None
        self._parts = [self._part(x, split, validation_fraction) for x in self._mixture.sources]
        held_out = split == "train" and any(isinstance(part, Corpus) for part in self._parts)
        # What a state must agree with for its positions to mean the same documents and tokens.
        self._identity: State = {
            "source": self._mixture.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "documents": sum(len(x.source) for x in self._parts if isinstance(x, Corpus)),
            "seed": seed,
            "held_out": validation_fraction if held_out else 0.0,
        }
        self._version = STATE_VERSION
        self._infinite = infinite
        if infinite:
            width = seq_len + num_future_tokens
            # Stretches of a window at least; a lane of a stream reads whole files.
            most = min(
                int(x.sizes[x.documents].sum()) // width if isinstance(x, Corpus) else x.num_shards
                for x in self._parts
            )
            self._begin(default_num_lanes(most, dp_world), dp_rank, {})
            self._state = self._snapshot()

    @property
    def identity(self) -> State:
        """What a run's ranks have to agree on, and but for `shares` its checkpoints; plain data."""
        return {**self._identity, "shares": self._mixture.shares}

    def next_window(self) -> Window:
        """The next micro-batch of this rank (infinite loaders)."""
        self._check_infinite()
        if self._depth == 0:
            window, self._state = self._produce()
            return window
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._produce, self._depth)
        window, self._state = self._prefetcher.get()
        return window

    def __iter__(self) -> Iterator[Window]:
        if not self._infinite:
            yield from self._one_pass()
        while self._infinite:
            yield self.next_window()

    @property
    def epoch(self) -> int:
        """Times this rank has been through all its documents, as of the last window handed out."""
        self._check_infinite()
        return min(at["epoch"] for lane in self._state["lanes"].values() for at in lane)

    def state_dict(self) -> State:
        """Plain data: the position after the last window handed out (not the last prefetched), for
        this rank's lanes. `merge_states` makes the run's out of all ranks'."""
        self._check_infinite()
        return {**self._state, "lanes": dict(self._state["lanes"])}

    def load_state_dict(self, state: State) -> None:
        """Continue from a merged state, on any number of data ranks that divides its lanes.

        Raises:
            UserError: the state is of other data, or its lanes can't be dealt to these ranks.
        """
        self._check_infinite()
        self._check_state(state)
        self.close()
        if state.get("shares", [1.0]) != (shares := self._mixture.shares):
            logger.warning(
                "dataset %s: from window %d on the sources' shares are %s, before they were %s",
                *(self._mixture.name, state["next_window"], shares, state["shares"]),
            )
        self._version = state["version"]
        self._restore(state)
        # this rank's first window from there
        self._next_window += (self._rank - self._next_window) % self._world
        self._state = self._snapshot()

    def close(self) -> None:
        """Stop the background thread. The loader can go on: it starts again where it was."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
            self._restore(self._state)

    def _check_infinite(self) -> None:
        if not self._infinite:
            raise RuntimeError("a finite loader is only iterated: it has no position")

    def _part(
        self, source: Source | StreamSource, split: str, fraction: float
    ) -> Corpus | StreamSource:
        if not isinstance(source, StreamSource):
            documents = split_documents(len(source), split, fraction, self._seed, source.name)
            return Corpus(source, documents, self._tokenizer, self._seed)
        if split == "validation":
            raise UserError(
                f"dataset {source.name}: nothing can be held out of a stream; give"
                " validation.dataset another one (c4_validation for c4), or turn validation.enable"
                " off"
            )
        return source

    def _restore(self, state: State) -> None:
        self._begin(state["num_lanes"], state["next_window"], state["lanes"])

    def _begin(self, num_lanes: int, next_window: int, places: State) -> None:
        self._num_lanes, self._next_window = num_lanes, next_window
        self._lanes = {}
        for lane in range(self._rank, num_lanes, self._world):
            at = places.get(str(lane), [None] * len(self._parts))
            at = at if isinstance(at, list) else [at]  # as older states have it
            parts = zip(self._parts, at, strict=True)
            self._lanes[lane] = [self._lane(part, lane, place) for part, place in parts]

    def _lane(self, part: Corpus | StreamSource, lane: int, place: Position | None) -> Lane:
        if not isinstance(part, Corpus):
            place = place or {"epoch": 0, "stream": None}
            return Lane(stream_share(part, self._tokenizer, lane, self._num_lanes, place), place)
        kind = DealtDocuments if self._version == DEALT_DOCUMENTS else Stretches
        pieces = kind(part, lane, self._num_lanes, place)
        return Lane(pieces, place or pieces.position())

    def _snapshot(self) -> State:
        return {
            "version": self._version,
            **self._identity,
            "shares": self._mixture.shares,
            "num_lanes": self._num_lanes,
            "next_window": self._next_window,
            "lanes": {
                str(number): [lane.position() for lane in lanes]
                for number, lanes in self._lanes.items()
            },
        }

    def _produce(self) -> tuple[Window, State]:
        rows = []
        for _ in range(self._batch_size):
            turn, lane = divmod(self._next_window, self._num_lanes)
            source = self._mixture.pick(lane, turn)
            row = self._lanes[lane][source].next_window(self._seq_len, self._lookahead)
            assert row is not None, "an endless lane has ended"
            rows.append(row)
            self._next_window += self._world
        return _stack(rows), self._snapshot()

    def _one_pass(self) -> Iterator[Window]:
        # Every rank reads and encodes the whole split, as one lane, and keeps its share: how many
        # windows there are is known to all of them at the same point, without communication.
        lane = Lane(once(self._parts, self._mixture.shares, self._tokenizer), {})
        rows: list[LaneWindow] = []
        number = 0
        while (row := lane.next_window(self._seq_len, self._lookahead)) is not None:
            if number % self._world == self._rank:
                rows.append(row)
            number += 1
            if number % (self._world * self._batch_size) == 0:
                yield _stack(rows)
                rows = []
        if number % (self._world * self._batch_size):
            width = self._seq_len + self._lookahead
            padding = LaneWindow(
                np.zeros(width, np.int64), np.full(width, PADDING), np.zeros(width, np.bool_)
            )
            yield _stack(rows + [padding] * (self._batch_size - len(rows)))

    def _check_state(self, state: State) -> None:
        name = self._mixture.name
        anew = ", or start the data anew with --checkpoint.exclude_from_loading dataloader"
        if (version := state.get("version")) not in (DEALT_DOCUMENTS, STATE_VERSION):
            raise UserError(
                f"dataset {name}: the checkpoint's data position has version {version}, this"
                f" package reads {DEALT_DOCUMENTS} and {STATE_VERSION}: update it{anew}"
            )
        self._tokenizer.go_on_as(str(state.get("tokenizer")))
        self._identity["tokenizer"] = self._tokenizer.fingerprint
        for key, mine in self._identity.items():
            found = state.get(key, mine if key == "documents" else None)  # older states lack it
            if found != mine and key == "source" and self._accept_changed_data:
                told = "dataset %s: not the files of the checkpoint; going on at its place in these"
                logger.warning(told, name)
            elif found != mine:
                raise UserError(
                    f"dataset {name}: the checkpoint's data position has {key}"
                    f" {found!r}, this run has {mine!r}: put back {_CAUSES[key]}{anew}"
                )
        lanes = state["num_lanes"]
        if lanes % self._world:
            allowed = [r for r in range(1, lanes + 1) if lanes % r == 0]
            raise UserError(
                f"dataset {name}: the checkpoint's data is in {lanes} lanes, which"
                f" can't be dealt to {self._world} data ranks; resume on one of {allowed}"
            )
        for lane in range(self._rank, lanes, self._world):
            if str(lane) not in state["lanes"]:
                raise UserError(
                    f"dataset {name}: the checkpoint's data position lacks lane {lane} of {lanes},"
                    f" as if one rank alone had saved it: load another checkpoint{anew}"
                )


def default_num_lanes(most: int, dp_world: int) -> int:
    """V for a new run: `dp_world`, doubled as long as that is at most NUM_LANES and `most`. So
    a run can go on with half and twice as many ranks."""
    lanes = dp_world
    while 2 * lanes <= min(NUM_LANES, most):
        lanes *= 2
    return lanes


def merge_states(states: Iterable[State]) -> State:
    """One state of the whole run out of every data rank's, taken after the same step.

    The next window of the run is the least of the ranks' next ones.

    Raises:
        ValueError: no state, or states of different runs.
    """
    states = list(states)
    if not states:
        raise ValueError("no loader state to merge")
    own = dict.fromkeys(("next_window", "lanes"))
    if any(state | own != states[0] | own for state in states):
        raise ValueError("loader states of different runs can't be merged")
    lanes = {lane: places for state in states for lane, places in state["lanes"].items()}
    return {
        **states[0],
        "next_window": min(state["next_window"] for state in states),
        "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0]))),
    }


def _stack(rows: list[LaneWindow]) -> Window:
    """Rows [S+n] to a window [B, S+n]; the mask only where something is masked."""
    tokens, doc_ids, may_be_target = (np.stack(x) for x in zip(*rows, strict=True))
    masked = not (may_be_target | (doc_ids == PADDING)).all()
    return Window(
        torch.from_numpy(tokens),
        torch.from_numpy(doc_ids),
        torch.from_numpy(may_be_target) if masked else None,
    )
