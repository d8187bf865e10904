# shellcheck shell=bash disable=SC2034 # read by env.sh and by the slurm launcher
# The properties of your cluster. Copy this file to slurm/site.sh and uncomment what your cluster needs;
# `fine-dist doctor --launcher slurm` finds most of it by one short job. FINE_DIST_SITE=FILE names another file.
# Every job sources it before anything else, and so do the scripts and `--launcher slurm` where a job is submitted: it
# must work on login nodes and on compute nodes, and must not start anything. It is sourced without `set -u`, so that
# modules and conda work. A submitted job has a copy of it in RUN_DIR/code.

# --- modules, or an environment -------------------------------------------------------------------------------------
# module purge && module load cuda/12.4 python/3.11
# source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate fine_dist
# source "$HOME/fine_dist/.venv/bin/activate"
# PYTHON=python                 # the interpreter of the scripts

# --- a container ----------------------------------------------------------------------------------------------------
# Pyxis (srun has --container-image): further options of srun, for every step.
# CONTAINER_SRUN="--container-image=/images/fine_dist.sqsh --container-mounts=/scratch:/scratch,$HOME:$HOME"
# Apptainer, Singularity: a command line before Python's, which must have the same path inside and outside (a virtual
# environment that is bound). The command that submits runs outside, because images have no sbatch.
# CONTAINER_EXEC="apptainer exec --nv --bind /scratch /images/fine_dist.sif"

# --- accelerators ---------------------------------------------------------------------------------------------------
# The option by which jobs request accelerators: gpus-per-node, gres (--gres=gpu:N) or gpus-per-task.
# GPU_FLAG=gres

# --- network --------------------------------------------------------------------------------------------------------
# The interface that NCCL and Gloo use between nodes; `ip -4 addr` on a compute node lists them.
# IFNAME=ib0

# --- scratch --------------------------------------------------------------------------------------------------------
# A folder on the nodes' local disks, for temporary files and compiled kernels; made on every node when a job starts.
# The cluster's own $SCRATCH, which is often a shared file system, is not used for that: it is unset while this file is
# sourced, and has its value again afterwards. run_dir, data and checkpoints belong on storage that all nodes share.
# SCRATCH=/scratch/$USER/${SLURM_JOB_ID:-login}

# --- restarts -------------------------------------------------------------------------------------------------------
# scontrol: a job that is stopped early puts itself back into the queue. resubmit: where users may not do that, the job
# submits itself again with a new id, at most launch.max_restarts times (scripts: MAX_RESTARTS). Jobs that depend on the
# old id (pipeline.sh's afterok) are then cancelled: run pipeline.sh again, which repeats nothing that is done.
# REQUEUE=resubmit
# MAX_RESTARTS=20
