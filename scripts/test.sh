#!/usr/bin/env bash
# Set up what is missing and run the tests: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev
exec "$PYTHON" -m pytest "$@"
