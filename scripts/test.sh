#!/usr/bin/env bash
# Set up what is missing and run the tests, three files at a time (on two cores: some wait), in their order, which
# ends with short ones:
#
#     scripts/test.sh [pytest arguments]          all of them
#     scripts/test.sh fast [pytest arguments]     in a minute: labels, losses and gradients against
#                                                 naive ones, losses of earlier versions, decoding,
#                                                 configuration, imports
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fast=(tests/integration/test_earlier_files.py tests/unit/{cli,config,models,mtp}
    tests/unit/data/test_{targets,endless_loader,one_pass,tokenizer}.py tests/unit/checkpoint/test_record.py
    tests/unit/inference/test_decoding.py
    tests/unit/ops/test_{head_by_head,linear_cross_entropy}.py
    tests/unit/test_{imports,optimizer,trainer}.py)
if [[ ${1:-} == fast ]]; then
    shift
    set -- -m "not slow and not exhaustive" "${fast[@]}" "$@"
fi
source scripts/setup.sh dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a test and its processes on one core
exec "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
