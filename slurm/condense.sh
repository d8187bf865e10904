#!/usr/bin/env bash
# Condense an ancestor into a learngene: [CONFIG=FILE] [NODES=N] sbatch slurm/condense.sh [--key value ...]; see env.sh for all settings.
#SBATCH --job-name=condense
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
# shellcheck source=slurm/env.sh
source "${FINE_DIST_CODE:-${SLURM_SUBMIT_DIR:-.}}/slurm/env.sh"
stage "$0" "${MODULE:-fine_dist.condense}" "${CONFIG:-configs/condense/dit_b.yaml}" "$@"
