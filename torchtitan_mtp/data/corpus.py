"""A random-access source as one stream of tokens an epoch, of which each lane reads a segment.

An epoch is all documents of the split, laid end to end in an order shuffled anew, and lane l of V
reads an equal segment of it. So a lane's share is measured in tokens and not in documents, and a
long document is cut over several lanes. Segments are measured in the sizes of `Corpus.sizes`;
an end that falls inside a document, at a fraction f of its size, is an end at token
round(f * tokens) for both neighbours: every token is read once an epoch, however rough the sizes.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np

from torchtitan_mtp.data.chat import chat_tokenizer, encode_conversation
from torchtitan_mtp.data.document import SKIPPED, Document
from torchtitan_mtp.data.files import BadRecords
from torchtitan_mtp.data.order import shuffled
from torchtitan_mtp.data.parquet import CACHED_ROW_GROUPS
from torchtitan_mtp.data.sources import Source
from torchtitan_mtp.data.tokenizer import ByteTokenizer, Tokenizer
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

# A split of up to this size, in as many documents, is encoded once at the start, to be counted.
ENCODED_BYTES = 16 << 20
_ENCODED_DOCUMENTS = 1 << 16  # of which a file gives some 20,000 a second
_BYTES_A_TOKEN = 4  # of what is not: for the begin and end tokens, which no byte stands for


@dataclass(eq=False)
class Encoded:
    """A document as tokens, [T] int32: prefix, prompt, text, eos, or a conversation; and which of
    them may be targets, [T] bool: not what a prompt has before the text, nor what others than the
    assistant say."""

    tokens: np.ndarray
    is_target: np.ndarray


def encode_document(
    tokenizer: Tokenizer,
    document: Document,
    where: Callable[[], str],
    bad: BadRecords | None = None,
) -> Encoded:
    """The tokens of a document. One on which the tokenizer or its chat template fails is a bad
    record, of which `where` names the place: without tokens, if `bad` skips such, else an error."""
    bad = bad or BadRecords("stop")
    front = np.array(tokenizer.prefix, np.int32)
    if document.conversation:
        chat_tokenizer(tokenizer.place)  # that there is none is no fault of the record
    try:
        if document.conversation:
            return Encoded(*encode_conversation(tokenizer, document.conversation))
        prompt, text = (
            tokenizer.encode(x) if x else front[:0] for x in (document.prompt, document.text)
        )
    except UserError as e:
        return _without_tokens(bad, where(), str(e))
    except (KeyboardInterrupt, SystemExit, MemoryError):  # which are of no document
        raise
    except BaseException as e:  # those written in Rust panic with BaseExceptions
        found = f"the tokenizer fails on this document ({type(e).__name__}: {str(e)[:200]})"
        return _without_tokens(bad, where(), found)
    tokens = np.concatenate([front, prompt, text, [tokenizer.eos_id]], dtype=np.int32)
    is_target = np.ones(len(tokens), np.bool_)
    if document.prompt:
        is_target[: len(front) + len(prompt)] = False
    return Encoded(tokens, is_target)


def _no_tokens() -> Encoded:
    """What there is of a record that is skipped."""
    return Encoded(np.empty(0, np.int32), np.empty(0, np.bool_))


def _without_tokens(bad: BadRecords, where: str, found: str) -> Encoded:
    bad.add(where, found)
    if bad.count == 1:
        logger.warning("bad records are left out, the first: %s", bad.first)
    return _no_tokens()


@dataclass(eq=False)
class Epoch:
    """Documents in reading order, [D] int64, and their sizes up to and with each, summed, [D]."""

    order: np.ndarray
    cumulative_sizes: np.ndarray


class Corpus:
    """The documents of a split, measured; what lanes share of their reading of it."""

    def __init__(
        self, source: Source, documents: np.ndarray, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.source = source
        self.documents = documents
        self._tokenizer = tokenizer
        self.seed = seed
        self.skipped = source.sizes() == SKIPPED
        self._bad = BadRecords(source.bad_records)  # found when they are encoded
        self.check_some()
        # Both live as long as a lane reads in them: lanes of one epoch have one order, and a
        # document that many lanes share is encoded once.
        self._epochs: WeakValueDictionary[int, Epoch] = WeakValueDictionary()
        self._encoded: WeakValueDictionary[int, Encoded] = WeakValueDictionary()

    def check_some(self) -> None:
        """Error: all records are skipped."""
        if self.skipped[self.documents].all():
            raise UserError(
                f"dataset {self.source.name}: all {len(self.documents)} of a split are bad records;"
                " mend them, or change training.validation_fraction"
            )

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """What segments are measured in, at the documents' numbers, int64 [len(source)]: tokens,
        where they are known (bytes are) or quickly counted; else roughly in proportion. 0 of a
        record that is skipped."""
        sizes = self.source.sizes().clip(min=0)
        specials = ~self.skipped * len(encode_document(self._tokenizer, Document(""), str).tokens)
        if isinstance(self._tokenizer, ByteTokenizer):
            return sizes + specials
        many = len(self.documents) > _ENCODED_DOCUMENTS
        if many or sizes[self.documents].sum() > ENCODED_BYTES:
            return sizes + specials * _BYTES_A_TOKEN

        def count(documents: np.ndarray) -> None:
            for i in map(int, documents):
                with contextlib.suppress(UserError):  # raised when it is read for training
                    sizes[i] = len(self.encode(i).tokens)

        # Encoding lets go of Python's lock. No more threads than a Parquet file keeps row groups.
        with ThreadPoolExecutor(CACHED_ROW_GROUPS) as threads:
            list(threads.map(count, np.array_split(self.documents, 64)))
        if self._bad.count:
            told = "dataset %s: %d bad record(s) skipped that the tokenizer or its template refuses"
            logger.warning(told, self.source.name, self._bad.count)
        return sizes

    def epoch(self, number: int) -> Epoch:
        epoch = self._epochs.get(number)
        if epoch is None:
            order = shuffled(self.documents, self.seed, number)
            epoch = self._epochs[number] = Epoch(order, np.cumsum(self.sizes[order]))
        return epoch

    def encode(self, number: int) -> Encoded:
        """A document's tokens, of a record that is skipped none."""
        if self.skipped[number]:
            return _no_tokens()
        document = self._encoded.get(number)
        if document is None:
            where = functools.partial(self.source.where, number)
            document = encode_document(self._tokenizer, self.source[number], where, self._bad)
            self._encoded[number] = document
            self.skipped[number] = not len(document.tokens)
        return document
