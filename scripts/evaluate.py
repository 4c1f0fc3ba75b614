"""Measure what a model's heads are worth: torchtitan_mtp/cli/evaluate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchtitan_mtp.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
