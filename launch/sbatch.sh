#!/usr/bin/env bash
# Slurm: sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/sbatch.sh CONFIG [key=value …]
#SBATCH --job-name=fmscale
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
exec srun --kill-on-bad-exit=1 python -m fmscale train "$@"
