"""Train a byte-level BPE tokenizer: torchtitan_mtp/cli/train_tokenizer.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchtitan_mtp.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
