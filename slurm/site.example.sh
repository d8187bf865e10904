# shellcheck shell=bash disable=SC2034 # read by env.sh and by the slurm launcher
# What differs from cluster to cluster, in one place. Copy this file to slurm/site.sh and change what your site needs;
# without it, nothing here holds. FINE_DIST_SITE=FILE names another one. Every job sources it before anything else, and so
# do the scripts and `--launcher slurm` where a job is submitted: it must work on login nodes and on compute nodes, and
# must not start anything. A submitted job has a copy of it (RUN_DIR/code), as of everything else.

# --- modules, or an environment -------------------------------------------------------------------------------------
# module purge && module load cuda/12.4 python/3.11
# source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate fine_dist
# source "$HOME/fine_dist/.venv/bin/activate"
# PYTHON=python                 # the interpreter of the scripts

# --- a container ----------------------------------------------------------------------------------------------------
# Pyxis (srun has --container-image): further options of srun, for every step.
# CONTAINER_SRUN="--container-image=/images/fine_dist.sqsh --container-mounts=/scratch:/scratch,$HOME:$HOME"
# Apptainer, Singularity: a command line before Python's, which must have the same path inside and outside (a virtual
# environment that is bound). What submits runs outside, because images have no sbatch.
# CONTAINER_EXEC="apptainer exec --nv --bind /scratch /images/fine_dist.sif"

# --- accelerators ---------------------------------------------------------------------------------------------------
# How this site wants them to be asked for: gpus-per-node, gres (--gres=gpu:N) or gpus-per-task.
# GPU_FLAG=gres

# --- network --------------------------------------------------------------------------------------------------------
# The interface that NCCL and Gloo use between nodes; `ip -4 addr` on a compute node lists them.
# IFNAME=ib0

# --- scratch --------------------------------------------------------------------------------------------------------
# A folder on the nodes' own disks, for temporary files and compiled kernels; made on every node when a job starts.
# Runs, data and checkpoints do not belong there: run_dir is on storage that all nodes share.
# SCRATCH=/scratch/$USER/${SLURM_JOB_ID:-login}

# --- restarts -------------------------------------------------------------------------------------------------------
# scontrol: a job that is stopped early puts itself back into the queue. resubmit: users may not do so here; it submits
# itself again, with a new id, as often as launch.max_restarts (scripts: MAX_RESTARTS) says. Jobs that wait for the old id
# (pipeline.sh's afterok) are then cancelled: run pipeline.sh again, which repeats nothing that is done.
# REQUEUE=resubmit
# MAX_RESTARTS=20
