"""Other programs' formats, both ways, one tensor at a time."""

from torchtitan_mtp.formats.exporting import DEFAULT_SHARD_SIZE, export_checkpoint
from torchtitan_mtp.formats.formats import FORMATS
from torchtitan_mtp.formats.importing import import_checkpoint
from torchtitan_mtp.formats.same import SAME

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "FORMATS",
    "SAME",
    "export_checkpoint",
    "import_checkpoint",
]
