"""Continue texts with a trained model: torchtitan_mtp/cli/generate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchtitan_mtp.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
