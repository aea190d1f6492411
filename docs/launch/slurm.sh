#!/bin/bash
# One training over several machines with SLURM: sbatch docs/launch/slurm.sh --config clover.yaml --output runs/clover
# Lightning reads ranks and addresses from SLURM. Two minutes before the time limit SLURM sends SIGTERM: the training
# saves and ends, and the same line with `--resume last` behind it goes on.
#SBATCH --job-name=slipstream
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGTERM@120
set -euo pipefail
srun --kill-on-bad-exit=1 python train.py --trainer.num_nodes "$SLURM_NNODES" \
    --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy deepspeed_2 --trainer.precision bf16-mixed "$@"
