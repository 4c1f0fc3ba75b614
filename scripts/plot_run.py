"""Draw runs beside one another: torchtitan_mtp/cli/plot_run.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchtitan_mtp.cli.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
