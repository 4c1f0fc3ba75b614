"""Windows of tokens for every data rank, in one global order that no world size changes.

The token stream of a run is V lanes, V fixed when the run begins: each reads an equal segment of
every epoch (corpus.py), and cuts it into windows (lanes.py). Window g of the run is the
next window of lane g mod V, and a step whose global batch is B windows trains on windows
t*B .. (t+1)*B - 1. With several sources (mixture.py) every lane has a segment of each.

Data rank r of R, where R divides V, makes the windows with g mod R = r, which come from the lanes
with l mod R = r. The position of a run is V, the next g, and for each lane and source its document
and token, so a run continues on any R that divides V with the same global batches.
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch

from torchtitan_mtp.data.chat import template_fingerprint
from torchtitan_mtp.data.corpus import Corpus
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.lanes import Lane, Position, corpus_pieces, one_pass_pieces, stream_pieces
from torchtitan_mtp.data.mixture import Mixture
from torchtitan_mtp.data.order import split_documents
from torchtitan_mtp.data.sources import Source
from torchtitan_mtp.data.targets import PADDING, Window
from torchtitan_mtp.data.tokenizer import Tokenizer
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
    "chat_template": "the chat template of model.hf_assets_path as it was",
    "held_out": "validation.enable, validation.dataset and training.validation_fraction",
}

State = dict[str, Any]


@dataclass(eq=False, repr=False)
class DataLoader:
    """Windows [local_batch_size, S+n] for one data rank.

    An infinite loader goes on epoch after epoch. A finite one is only iterated: one pass over the
    split in its own order, the same windows whatever the world size; every rank yields the same
    number of micro-batches, the last filled with padding.

    Raises:
        UserError: no document to hold out; conversations, and a tokenizer without a chat template.
    """

    source: Source | StreamSource | Mixture
    tokenizer: Tokenizer
    seq_len: int  # S, tokens of input in a window
    num_future_tokens: int  # n, tokens of lookahead
    local_batch_size: int  # windows in a micro-batch of this rank
    dp_rank: int = 0  # ranks that share their data (tensor, context) have the same
    dp_world: int = 1
    _: KW_ONLY
    seed: int = 0  # of the order of documents and of the split
    split: str = "train"  # or "validation" (the documents held out), "all"; `split_documents`
    validation_fraction: float = 0.05  # share of documents held out, in [0, 1)
    infinite: bool = True
    prefetch: int = 2  # micro-batches that a background thread makes ahead (infinite only)
    accept_changed_data: bool = False  # take a state of other files, of as many documents

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.num_future_tokens < 1 or self.local_batch_size < 1:
            raise ValueError("seq_len, num_future_tokens and local_batch_size must be positive")
        if not 0 <= self.dp_rank < self.dp_world:
            raise ValueError(f"data rank {self.dp_rank} of {self.dp_world}")
        self._mixture = self.source if isinstance(self.source, Mixture) else Mixture([self.source])
        self._parts = [self._part(source) for source in self._mixture.sources]
        held_out = self.split == "train" and any(isinstance(x, Corpus) for x in self._parts)
        # What a run's ranks have to agree on, and but for the shares a state, for its positions to
        # mean the same documents and tokens; plain data.
        self.identity: State = {
            "source": self._mixture.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "documents": sum(len(x.source) for x in self._parts if isinstance(x, Corpus)),
            "seed": self.seed,
            "held_out": self.validation_fraction if held_out else 0.0,
            "shares": self._mixture.shares,
            "chat_template": None,
        }
        if any(source.has_conversations for source in self._mixture.sources):
            self.identity["chat_template"] = template_fingerprint(self.tokenizer)
        if self.infinite:
            width = self.seq_len + self.num_future_tokens
            # Segments of a window at least; a lane of a stream reads whole files.
            most = min(
                int(x.sizes[x.documents].sum()) // width if isinstance(x, Corpus) else x.num_shards
                for x in self._parts
            )
            lanes = default_num_lanes(most, self.dp_world)
            self._begin(
                {"version": STATE_VERSION, "num_lanes": lanes, "next_window": 0, "lanes": {}}
            )

    def next_window(self) -> Window:
        """The next micro-batch of this rank (infinite loaders). Whatever making it raised is raised
        here, and by every later call."""
        while len(self._ahead) <= self.prefetch:
            self._ahead.append(self._thread.submit(self._produce))
        window, self._state = self._ahead[0].result()
        self._ahead.popleft()
        return window

    def __iter__(self) -> Iterator[Window]:
        if not self.infinite:
            yield from self._one_pass()
        while self.infinite:
            yield self.next_window()

    def state_dict(self) -> State:
        """Plain data: the position after the last window handed out (not the last prefetched), for
        this rank's lanes. `merge_states` makes the run's out of all ranks'."""
        return {**self._state, "lanes": dict(self._state["lanes"])}

    def load_state_dict(self, state: State) -> None:
        """Continue from a merged state, on any number of data ranks that divides its lanes.

        Raises:
            UserError: the state is of other data, or its lanes can't be dealt to these ranks.
        """
        self._check_state(state)
        self._thread.shutdown(cancel_futures=True)
        self._begin(state)

    def close(self) -> None:
        """Stop the background thread. The loader can go on: it starts again where it was."""
        if self.infinite:
            self._thread.shutdown(cancel_futures=True)
            self._begin(self._state)

    def _part(self, source: Source | StreamSource) -> Corpus | StreamSource:
        if not isinstance(source, StreamSource):
            documents = split_documents(
                len(source), self.split, self.validation_fraction, self.seed, source.name
            )
            return Corpus(source, documents, self.tokenizer, self.seed)
        if self.split == "validation":
            raise UserError(
                f"dataset {source.name}: nothing can be held out of a stream; give"
                " validation.dataset another one (c4_validation for c4), or turn validation.enable"
                " off"
            )
        return source

    def _begin(self, state: State) -> None:
        self._version, self._num_lanes = state["version"], state["num_lanes"]
        following = state["next_window"]
        self._next_window = following + (self.dp_rank - following) % self.dp_world  # this rank's
        self._thread = ThreadPoolExecutor(1, "data-prefetch")
        self._ahead: deque[Future[tuple[Window, State]]] = deque()
        self._lanes = {}
        for lane in range(self.dp_rank, self._num_lanes, self.dp_world):
            at = state["lanes"].get(str(lane), [{"epoch": 0}] * len(self._parts))
            at = at if isinstance(at, list) else [at]  # as older states have it
            parts = zip(self._parts, at, strict=True)
            self._lanes[lane] = [self._lane(part, lane, place) for part, place in parts]
        self._state = self._snapshot()

    def _lane(self, part: Corpus | StreamSource, lane: int, place: Position) -> Lane:
        if isinstance(part, Corpus):
            dealt = self._version == DEALT_DOCUMENTS
            return Lane(corpus_pieces(part, lane, self._num_lanes, place, dealt), place)
        return Lane(stream_pieces(part, self.tokenizer, lane, self._num_lanes, place), place)

    def _snapshot(self) -> State:
        return {
            "version": self._version,
            **self.identity,
            "num_lanes": self._num_lanes,
            "next_window": self._next_window,
            "lanes": {
                str(number): [lane.position() for lane in lanes]
                for number, lanes in self._lanes.items()
            },
        }

    def _produce(self) -> tuple[Window, State]:
        rows = []
        for _ in range(self.local_batch_size):
            index, lane = divmod(self._next_window, self._num_lanes)
            source = self._mixture.pick(lane, index)
            row = self._lanes[lane][source].next_window(self.seq_len, self.num_future_tokens)
            assert row is not None, "an endless lane has ended"
            rows.append(row)
            self._next_window += self.dp_world
        return _stack(rows), self._snapshot()

    def _one_pass(self) -> Iterator[Window]:
        # Every rank reads and encodes the whole split, as one lane, and keeps its share: how many
        # windows there are is known to all of them at the same point, without communication.
        lane = Lane(one_pass_pieces(self._parts, self._mixture.shares, self.tokenizer), {})
        windows = iter(partial(lane.next_window, self.seq_len, self.num_future_tokens), None)
        padding = Lane(iter(()), {}).peek(self.seq_len + self.num_future_tokens)
        together = self.dp_world * self.local_batch_size
        for _, batch in itertools.groupby(enumerate(windows), lambda x: x[0] // together):
            rows = [row for number, row in batch if number % self.dp_world == self.dp_rank]
            yield _stack(rows + [padding] * (self.local_batch_size - len(rows)))

    def _check_state(self, state: State) -> None:
        name = self._mixture.name
        anew = ", or start the data anew with --checkpoint.exclude_from_loading dataloader"
        if (version := state.get("version")) not in (DEALT_DOCUMENTS, STATE_VERSION):
            raise UserError(
                f"dataset {name}: the checkpoint's data position has version {version}, this"
                f" package reads {DEALT_DOCUMENTS} and {STATE_VERSION}: update it{anew}"
            )
        self.tokenizer.resume_as(str(state.get("tokenizer")))
        self.identity["tokenizer"] = self.tokenizer.fingerprint
        # Which older states lack.
        older = {"documents": self.identity["documents"], "shares": [1.0], "chat_template": None}
        for key, mine in self.identity.items():
            found = (older | state).get(key)
            # That a stream without columns has conversations was not seen before November 2026.
            if found == mine or (key == "chat_template" and found is None):
                continue
            if key == "source" and self.accept_changed_data:
                told = "dataset %s: not the files of the checkpoint; going on at its place in these"
                logger.warning(told, name)
            elif key == "shares":
                told = (
                    "dataset %s: from window %d on the sources' shares are %s, before they were %s"
                )
                logger.warning(told, name, state["next_window"], mine, found)
            else:
                raise UserError(
                    f"dataset {name}: the checkpoint's data position has {key}"
                    f" {found!r}, this run has {mine!r}: put back {_CAUSES[key]}{anew}"
                )
        lanes = state["num_lanes"]
        if lanes % self.dp_world:
            allowed = [r for r in range(1, lanes + 1) if lanes % r == 0]
            raise UserError(
                f"dataset {name}: the checkpoint's data is in {lanes} lanes, which"
                f" can't be dealt to {self.dp_world} data ranks; resume on one of {allowed}"
            )
        for lane in range(self.dp_rank, lanes, self.dp_world):
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


def _stack(rows: list[Window]) -> Window:
    """Rows [S+n] to a window [B, S+n]; the mask only where something is masked."""
    tokens, doc_ids, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return Window(tokens, doc_ids, None if (mask | (doc_ids == PADDING)).all() else mask)
