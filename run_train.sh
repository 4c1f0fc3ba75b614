#!/usr/bin/env bash
# Train on this machine:
#
#     ./run_train.sh                                        the quickstart: train, then sample
#     NGPU=8 CONFIG_FILE=mtp_8b.toml ./run_train.sh --training.steps 1000
#
# NGPU         processes to start (all GPUs, or 1 on a machine without)
# LOG_RANK     ranks whose output is shown, "0,1" for two (0)
# CONFIG_FILE  the recipe, unless --job.config_file names one (quickstart.toml): a file, or the bare
#              name of one in train_configs/, from any folder
#
# The exit code is the trainer's; torchrun makes every failure of several processes a 1.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
source "$root/scripts/setup.sh" core

quickstart=false
[[ $# -gt 0 || -n ${CONFIG_FILE:-} ]] || quickstart=true

config_given=false
for argument in "$@"; do
    case $argument in --job.config[_-]file | --job.config[_-]file=*) config_given=true ;; esac
done
$config_given || set -- --job.config_file "${CONFIG_FILE:-$root/train_configs/quickstart.toml}" "$@"

if [[ -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg ]]; then # NVIDIA, AMD, a GPU under WSL
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
fi
NGPU=${NGPU:-1}
if [[ ! $NGPU =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NGPU is '$NGPU'; expected a number of processes, 1 or more" >&2
    exit 1
fi

if [[ $NGPU == 1 ]]; then
    # Without torchrun, whose pipes would take the terminal (colours, progress) from the trainer.
    launch=("$PYTHON")
else
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    share=$((cores / NGPU > 0 ? cores / NGPU : 1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share} PYTHONUNBUFFERED=1
    launch=("$PYTHON" -m torch.distributed.run --nproc_per_node="$NGPU"
        --rdzv_backend c10d --rdzv_endpoint=localhost:0
        --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3)
fi
launch+=(-m torchtitan_mtp.train "$@")
$quickstart || exec "${launch[@]}"

# The quickstart has one more thing to do after the training, so this shell stays, and passes on
# what it is told to stop with. Job control gives the trainer a process group of its own: Ctrl-C
# then reaches it once, from here.
set -m
"${launch[@]}" &
trainer=$!
stopped=false
trap 'stopped=true; kill -INT "$trainer" 2>/dev/null || true' INT
trap 'stopped=true; kill -TERM "$trainer" 2>/dev/null || true' TERM
while kill -0 "$trainer" 2>/dev/null; do wait "$trainer" || true; done # a trap ends a wait early
wait "$trainer" && status=0 || status=$?
if $stopped || [[ $status -ne 0 ]]; then exit "$status"; fi
trap - INT TERM
set +m

sample=("$root/scripts/generate.py" outputs/quickstart
    --prompt "def " --max_new_tokens 200 --temperature 0.8 --speculative --compare)
printf '\n$ %s' "${PYTHON#"$PWD/"} ${sample[0]#"$PWD/"} ${sample[1]}"
printf ' %q' "${sample[@]:2}"
printf '\n'
exec "$PYTHON" "${sample[@]}"
