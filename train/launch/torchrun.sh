#!/usr/bin/env bash
# Trains on one machine with NPROC processes, one per GPU.
#
#   NPROC=8 train/launch/torchrun.sh --config instruct_small --output runs/a
#
# All arguments go to `symphony-vlm train`; the same command continues a run. Where there is no GPU the processes share
# the CPU: give each its part of the cores, e.g. OMP_NUM_THREADS=4.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m train.instruct "$@"
