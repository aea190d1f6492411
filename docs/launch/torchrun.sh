#!/bin/bash
# One training over several machines with torchrun: run this on every machine, with the same ADDRESS.
#   ADDRESS=node0 RANK=0 NODES=8 GPUS=8 docs/launch/torchrun.sh --config clover.yaml --output /shared/runs/clover
# Outputs and data must lie on a file system that all machines see.
set -euo pipefail
exec torchrun --nnodes "${NODES:?}" --nproc_per_node "${GPUS:?}" --node_rank "${RANK:?}" \
    --master_addr "${ADDRESS:?}" --master_port "${PORT:-29500}" \
    train.py --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.strategy deepspeed_2 \
    --trainer.precision bf16-mixed "$@"
