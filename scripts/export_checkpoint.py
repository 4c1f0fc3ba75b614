"""Write a model for other programs: torchtitan_mtp/cli/export_checkpoint.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchtitan_mtp.cli.export_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
