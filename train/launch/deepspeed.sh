#!/usr/bin/env bash
# Trains with DeepSpeed's own launcher; torchrun.sh runs the same engines, so this is for clusters set up for it.
#
#   NPROC=8 train/launch/deepspeed.sh --config ... --output runs/a stages.instruct.engine=zero2
#   HOSTFILE=hosts train/launch/deepspeed.sh ...    # several machines, reached by ssh; a line each: node-a slots=8
#
# The engine is the recipe's: this script alone does not turn DeepSpeed on. DeepSpeed passes variables of NCCL and
# Python to the other machines, and those named in ~/.deepspeed_env.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${HOSTFILE:-} ]]; then
  where=(--hostfile "$HOSTFILE")
else
  NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
  where=(--num_gpus "$NPROC" --master_port "${MASTER_PORT:-29500}")
fi

exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --no_local_rank --module train.instruct "$@"
