#!/usr/bin/env bash
# CreTok: a token for "creative": [CONFIG=FILE] [NODES=N] sbatch slurm/creative.sh [--key value ...]; see env.sh for all settings.
#SBATCH --job-name=creative
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
# shellcheck source=slurm/env.sh
source "${FINE_DIST_CODE:-${SLURM_SUBMIT_DIR:-.}}/slurm/env.sh"
stage "$0" "${MODULE:-fine_dist.creative}" "${CONFIG:-configs/creative/sd3.yaml}" "$@"
