#!/usr/bin/env bash
# One machine, one rank per GPU (NPROC overrides): launch/torchrun.sh CONFIG [key=value …]
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m fmscale train "$@"
