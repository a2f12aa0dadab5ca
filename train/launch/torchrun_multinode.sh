#!/usr/bin/env bash
# Trains on several machines. Start it on every one of them, with the same arguments and each its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a NPROC=8 train/launch/torchrun_multinode.sh --config ... --output runs/a
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a NPROC=8 train/launch/torchrun_multinode.sh --config ... --output runs/a
#
# MASTER_ADDR is the machine of NODE_RANK 0, as the others reach it. --output and the data must lie on storage that all
# of them share, under the same path.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
: "${NNODES:?number of machines}" "${NODE_RANK:?0 on the first machine, 1 on the second, ...}"
: "${MASTER_ADDR:?address of the first machine}"
NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" -m train.instruct "$@"
