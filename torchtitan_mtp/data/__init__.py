"""Documents to tokens, tokens to windows, windows to the targets of every head."""

from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.loader import DataLoader, merge_states
from torchtitan_mtp.data.sources import Source, build_source
from torchtitan_mtp.data.targets import IGNORE, PADDING, Batch, Window, make_batch
from torchtitan_mtp.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer

__all__ = [
    "IGNORE",
    "PADDING",
    "Batch",
    "ByteTokenizer",
    "DataLoader",
    "Document",
    "Source",
    "StreamSource",
    "Tokenizer",
    "Window",
    "build_source",
    "build_tokenizer",
    "make_batch",
    "merge_states",
]
