#!/usr/bin/env bash
# encode -> condense -> init -> train -> evaluate; each starts when the one before has succeeded. Prints their job ids.
#
#   [ENCODE=FILE CONDENSE=FILE INIT=FILE TRAIN=FILE EVALUATE=FILE] bash slurm/pipeline.sh     (or sbatch)
#
# The variables are the configs of the stages; a stage whose variable is empty (ENCODE=) is omitted. init runs as steps of
# one job, because its tasks depend on the learngene. NODES, GPUS and so on (see env.sh) apply to every stage.
#SBATCH --job-name=pipeline
#SBATCH --nodes=1
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=slurm/env.sh
source slurm/env.sh
ENCODE=${ENCODE-configs/encode/imagenet256.yaml}
CONDENSE=${CONDENSE-configs/condense/dit_b.yaml}
INIT=${INIT-configs/init/dit_b_family.yaml}
TRAIN=${TRAIN-configs/train/dit_b.yaml}
EVALUATE=${EVALUATE-configs/evaluate/dit_b.yaml}

tickets=() stages=()
for stage in encode condense init train evaluate; do # all are checked before the first is submitted
    config=${stage^^}
    [[ -n ${!config} ]] || continue
    stages+=("$stage")
    # The results of earlier stages do not exist yet, so the preflight must only warn.
    tickets+=("$(SPREAD=1 prepare "${MODULE:-fine_dist.$stage}" "${!config}" --launch.preflight warn)")
done
after=()
for i in "${!stages[@]}"; do
    id=$(submit "slurm/${stages[i]}.sh" "${tickets[i]}" "${after[@]}")
    echo "${stages[i]} $id"
    after=("--dependency=afterok:$id" --kill-on-invalid-dep=yes)
done
