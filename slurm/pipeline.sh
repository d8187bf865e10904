#!/usr/bin/env bash
# encode -> condense -> init -> train -> evaluate, each when the one before has ended well; prints their job ids.
#
#   [ENCODE=FILE CONDENSE=FILE INIT=FILE TRAIN=FILE EVALUATE=FILE] bash slurm/pipeline.sh     (or sbatch)
#
# Each is a stage's config; one set to nothing (ENCODE=) leaves its stage out. init runs as steps of one job, because its
# tasks are known only when there is a learngene; NODES, GPUS and so on (see env.sh) hold for every stage.
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
    # What earlier stages will make is not there yet: the preflight can only warn.
    tickets+=("$(SPREAD=1 prepare "${MODULE:-fine_dist.$stage}" "${!config}" --launch.preflight warn)")
done
after=()
for i in "${!stages[@]}"; do
    id=$(submit "slurm/${stages[i]}.sh" "${tickets[i]}" "${after[@]}")
    echo "${stages[i]} $id"
    after=("--dependency=afterok:$id" --kill-on-invalid-dep=yes)
done
