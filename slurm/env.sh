# shellcheck shell=bash disable=SC2153 # a ticket sets TASKS LIST JOB NAME RUN_DIR CODE PROCS WANT_NODES PARALLEL FLAGS
# Functions that the scripts in this folder share. Environment variables of `sbatch` configure them:
#
#   CONFIG      config file of the stage
#   NODES PROCS GPUS CPUS MINUTES PARTITION ACCOUNT   replace the config's `launch` settings (PROCS and GPUS: per node)
#   PYTHON      interpreter (default: python)
#   IFNAME      network interface for NCCL and Gloo, such as ib0
#   MAX_RESTARTS  maximum number of times that a job goes back into the queue (default: 20)
#
# The properties of a cluster are read from slurm/site.sh, or from the file FINE_DIST_SITE; see site.example.sh.
#
# A submission writes a ticket: a file of shell variables (see launchers/sbatch.py) that names its job files, its copy of
# the code and its sbatch options. The job's comment holds the ticket's path and survives a requeue. Without it, a
# requeued job would evaluate the script's arguments again, with files that may have changed since.

SITE=${FINE_DIST_SITE:-${FINE_DIST_CODE:-${SLURM_SUBMIT_DIR:-.}}/slurm/site.sh}
# Only the SCRATCH that the site file sets is a folder on the nodes' local disks. The SCRATCH that many clusters set for
# every user is a shared file system: it keeps its value for paths in configs, and no temporary files are put there.
cluster_scratch=${SCRATCH:-}
unset SCRATCH
if [[ -f $SITE ]]; then
    # The scripts of environment modules and conda read variables that are not set, which is an error under `set -u`.
    [[ $- != *u* ]] && nounset=+u || nounset=-u
    set +u
    # shellcheck source=slurm/site.example.sh
    source "$SITE"
    set "$nounset"
fi
export FINE_DIST_SCRATCH=${SCRATCH:-}
if [[ -n $cluster_scratch ]]; then export SCRATCH=$cluster_scratch; else unset SCRATCH; fi
PYTHON=${PYTHON:-python}
MAX_RESTARTS=${MAX_RESTARTS:-20}
export PYTHONUNBUFFERED=1
if [[ -n ${IFNAME:-} ]]; then
    export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
fi
read -ra SRUN_SITE <<<"${CONTAINER_SRUN:-}"
export CONTAINER_EXEC=${CONTAINER_EXEC:-}
# ON_NODE: the first command of every step. The scratch folder is made on every node, because it is on a local disk.
# shellcheck disable=SC2016 # expanded on the nodes
ON_NODE='if [[ -n $FINE_DIST_SCRATCH ]]; then mkdir -p "$FINE_DIST_SCRATCH" && \
    export TMPDIR=$FINE_DIST_SCRATCH TORCH_EXTENSIONS_DIR=$FINE_DIST_SCRATCH/torch; fi
'
# Where SBATCH_EXPORT=NONE is set for all users, jobs and steps would start without the variables set here.
EXPORT=--export=ALL

# stage SCRIPT MODULE CONFIG [--key value ...]: outside of a job, submit the stage; inside a job, run it.
stage() {
    local script=$1 module=$2 config=$3 ticket
    shift 3
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        ticket=$(prepare "$module" "$config" "$@")
        submit "$script" "$ticket"
        return
    fi
    SELF=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    SELF=${SELF:-$SLURM_JOB_ID} # for a task of an array, ID_TASK: the bare id means all tasks
    # A requeued job finds its ticket in its comment, and runs the same code and config as before.
    ticket=$(squeue -h -j "$SELF" -o %k)
    if [[ $ticket != *.sh ]]; then
        ticket=$(prepare "$module" "$config" "$@")
        scontrol update "jobid=$SELF" "comment=$ticket"
    fi
    # shellcheck source=/dev/null
    source "$ticket"
    TICKET_NOW=$ticket
    if ((TASKS > 0 || SLURM_JOB_NUM_NODES < WANT_NODES)) && [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
        echo "continues as job $(submit "$0" "$ticket")" # this allocation is too small, or there are several tasks
        return
    fi
    if [[ -z ${TICKET:-} ]]; then # submitted by sbatch itself, whose output file is not in the run directory
        echo "output: $RUN_DIR/logs/$NAME-$SELF.log"
        exec >>"$RUN_DIR/logs/$NAME-$SELF.log" 2>&1
    fi
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        JOB=$(sed -n "$((OFFSET + SLURM_ARRAY_TASK_ID + 1))p" "$LIST")
    fi
    run
}

# prepare MODULE CONFIG [--key value ...]: copy code and config into the run directory; prints the ticket's path.
prepare() {
    local module=$1 config=$2 key value
    shift 2
    if ! "$PYTHON" -c 'from importlib.util import find_spec; [find_spec(n).name for n in ("torch", "pydantic", "fine_dist")]' \
        2>/dev/null; then
        echo "error: PYTHON=$PYTHON is no interpreter with this project installed; set PYTHON=/path/to/python, or" \
            "activate the environment in slurm/site.sh (copy slurm/site.example.sh)" >&2
        exit 2
    fi
    for key in NODES PROCS CPUS MINUTES PARTITION ACCOUNT; do
        value=${!key:-}
        [[ $key == PROCS ]] && key=processes
        [[ -z $value ]] || set -- "$@" "--launch.${key,,}" "$value"
    done
    [[ -z ${GPUS:-} ]] || set -- "$@" --launch.gpus 1 --launch.processes "$GPUS"
    "$PYTHON" -m fine_dist.submit ${SPREAD:+--spread} prepare "$module" --config "$config" "$@"
}

# submit SCRIPT TICKET [sbatch options]: submit the jobs of a ticket; prints their ids, joined by colons. A fan-out
# becomes one or several arrays, because indices of an array are less than MaxArraySize.
submit() (
    local script=$1 ticket=$2 limit offset count ids=()
    shift 2
    # shellcheck source=/dev/null
    source "$ticket"
    # shellcheck disable=SC2046 # sbatch would take the SLURM_* variables of a surrounding job as its options
    unset $(compgen -v SLURM_ | grep -v '^SLURM_CONF$')
    if ((TASKS == 0)); then
        [[ -n $JOB ]] || return 0
        TICKET=$ticket FINE_DIST_CODE=$CODE sbatch --parsable "$EXPORT" "${FLAGS[@]}" "--job-name=$NAME" "--comment=$ticket" \
            "--output=$RUN_DIR/logs/%x-%j.log" "$@" "$script"
        return
    fi
    limit=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
    for ((offset = 0; offset < TASKS; offset += limit)); do
        count=$((TASKS - offset < limit ? TASKS - offset : limit))
        ids+=("$(TICKET=$ticket FINE_DIST_CODE=$CODE OFFSET=$offset sbatch --parsable "$EXPORT" "${FLAGS[@]}" \
            "--job-name=$NAME" "--comment=$ticket" \
            "--array=0-$((count - 1))${PARALLEL:+%$PARALLEL}" "--output=$RUN_DIR/logs/%x-%A_%a.log" "$@" "$script")")
    done
    IFS=:
    echo "${ids[*]}"
)

# resubmit: submit this job again; prints its new id.
resubmit() (
    local again=(--parsable "$EXPORT" "${FLAGS[@]}" "--job-name=$NAME" "--comment=$TICKET_NOW")
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        again+=("--array=$SLURM_ARRAY_TASK_ID" "--output=$RUN_DIR/logs/%x-%A_%a.log")
    else
        again+=("--output=$RUN_DIR/logs/%x-%j.log")
    fi
    export TICKET=$TICKET_NOW FINE_DIST_CODE=$CODE
    # shellcheck disable=SC2046
    unset $(compgen -v SLURM_ | grep -v '^SLURM_CONF$')
    sbatch "${again[@]}" "$0"
)

# run: run the job file JOB on all nodes of this allocation, and end the script.
run() {
    local code=0 signaled=0 pid
    export JOB PROCS PYTHON MASTER_ADDR MASTER_PORT FINE_DIST_EXIT_FILE="$RUN_DIR/jobs/.exit-$SLURM_JOB_ID"
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    # As in fine_dist.core.processes.derived_port: a port derived from the job's id, so that jobs on one node differ, and
    # below Linux's range of ports for outgoing connections.
    MASTER_PORT=$((20000 + SLURM_JOB_ID * 131 % 10000))
    rm -f "$FINE_DIST_EXIT_FILE"
    cd "$CODE" || exit 2
    # Before the time limit, SLURM sends USR1 to this shell only (--signal=B:USR1@...); the workers save when they get it.
    trap 'signaled=1; kill -USR1 "$pid" 2>/dev/null' USR1
    if [[ -n $SPREAD ]]; then
        "$PYTHON" -m fine_dist.submit spread "$JOB" &
    else
        step &
    fi
    pid=$!
    # A loop, because a trapped signal interrupts `wait` before the child has ended.
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" && code=0 || code=$?
    done
    [[ ! -s $FINE_DIST_EXIT_FILE ]] || code=75
    if ((code == 75)) && [[ -e $RUN_DIR/STOP || -e $RUN_DIR/STOPPED ]]; then
        echo "stopped by a file STOP; the same command continues it" >&2
    elif ((code == 75 || (code != 0 && signaled))); then
        requeue
    fi
    exit "$code"
}

# step: one torchrun on each node.
step() {
    # shellcheck disable=SC2016 # expanded on the nodes
    exec srun "$EXPORT" "${SRUN_SITE[@]}" --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$ON_NODE"'
        if ((SLURM_JOB_NUM_NODES * PROCS == 1)); then exec $CONTAINER_EXEC "$PYTHON" -m fine_dist.worker "$JOB"; fi
        # SLURM signals every process of the step, and torchrun has no handler for USR1, which would end it.
        trap "" USR1
        exec $CONTAINER_EXEC "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$PROCS" \
            --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
            -m fine_dist.worker "$JOB"'
}

# requeue: requeue this job, unless it was cancelled or has been restarted too often. If the site does not allow that
# (REQUEUE=resubmit in site.sh), submit it again with the same ticket and the same task of an array.
requeue() {
    local state='' restarts=$((${SLURM_RESTART_COUNT:-0} + ${RESUBMITTED:-0})) _
    for _ in {1..5}; do # the controller may be restarting
        state=$(squeue -h -j "$SELF" -o %T) && break
        sleep 2
    done
    if [[ $state != RUNNING ]]; then
        echo "the job is ${state:-gone}: not requeued" >&2
        exit 75
    elif ((restarts >= MAX_RESTARTS)); then
        echo "restarted $MAX_RESTARTS times already; the same command continues it" >&2
        exit 75
    fi
    if [[ ${REQUEUE:-scontrol} == resubmit && -z ${TICKET_NOW:-} ]]; then
        echo "saved; users may not requeue here: submit the same command again" >&2
        exit 75
    elif [[ ${REQUEUE:-scontrol} == resubmit ]]; then
        echo "saved; continues as job $(RESUBMITTED=$((restarts + 1)) resubmit) (restart $((restarts + 1)) of at most $MAX_RESTARTS)"
        exit 75
    fi
    echo "saved; requeued (restart $((restarts + 1)) of at most $MAX_RESTARTS)"
    scontrol requeue "$SELF"
    exit 75
}
