#!/usr/bin/env bash
# Set up what is missing and run the tests, two files at a time: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a test and its processes on one core
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
