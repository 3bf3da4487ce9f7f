#!/usr/bin/env bash
# What `fmscale submit train` does, by hand:
# sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/sbatch.sh CONFIG [key=value …]
#SBATCH --job-name=fmscale
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@90
set -uo pipefail
export FMSCALE_SIGNAL_DELAY_S=90  # as above: by then all ranks have saved and ended
read_run_dir='import sys; from fmscale.plain_yaml import parse_yaml; print(parse_yaml(sys.stdin.read(), "config")["run_dir"])'
run_dir=$(python -m fmscale train "$@" --print-config | python -c "$read_run_dir")
echo "== job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
srun --kill-on-bad-exit=0 --wait=10 python -m fmscale train "$@"
python -m fmscale requeue "$run_dir" $?
