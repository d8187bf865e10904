# shellcheck shell=bash disable=SC2153 # a ticket sets TASKS LIST JOB NAME RUN_DIR CODE PROCS WANT_NODES PARALLEL FLAGS
# What the scripts in this folder share. They are steered by the environment of `sbatch`:
#
#   CONFIG      the stage's config file
#   NODES PROCS GPUS CPUS MINUTES PARTITION ACCOUNT   over the config's `launch` (PROCS and GPUS are per node)
#   PYTHON      the interpreter (python)
#   IFNAME      network interface for NCCL and Gloo, such as ib0
#   MAX_RESTARTS  how often a job may be put back into the queue (20)
#
# What differs from cluster to cluster is read from slurm/site.sh, or FINE_DIST_SITE; see site.example.sh.

SITE=${FINE_DIST_SITE:-${FINE_DIST_CODE:-${SLURM_SUBMIT_DIR:-.}}/slurm/site.sh}
if [[ -f $SITE ]]; then
    # shellcheck source=slurm/site.example.sh
    source "$SITE"
fi
PYTHON=${PYTHON:-python}
MAX_RESTARTS=${MAX_RESTARTS:-20}
export PYTHONUNBUFFERED=1
if [[ -n ${IFNAME:-} ]]; then
    export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
fi
read -ra SRUN_SITE <<<"${CONTAINER_SRUN:-}"
# ON_NODE: what every step of a job does first. SCRATCH is made there, because it is on the nodes' own disks.
export SCRATCH=${SCRATCH:-} CONTAINER_EXEC=${CONTAINER_EXEC:-}
# shellcheck disable=SC2016 # expanded on the nodes
ON_NODE='if [[ -n $SCRATCH ]]; then mkdir -p "$SCRATCH" && export TMPDIR=$SCRATCH TORCH_EXTENSIONS_DIR=$SCRATCH/torch; fi
'

# stage SCRIPT MODULE CONFIG [--key value ...]: outside of a job, submit it; inside, run it.
stage() {
    local script=$1 module=$2 config=$3 ticket
    shift 3
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        ticket=$(prepare "$module" "$config" "$@")
        submit "$script" "$ticket"
        return
    fi
    SELF=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    SELF=${SELF:-$SLURM_JOB_ID} # an array's bare number means all of it
    # The job's comment names its ticket, so that a requeued job runs the code and config it began with.
    ticket=$(squeue -h -j "$SELF" -o %k)
    if [[ $ticket != *.sh ]]; then
        ticket=$(prepare "$module" "$config" "$@")
        scontrol update "jobid=$SELF" "comment=$ticket"
    fi
    # shellcheck source=/dev/null
    source "$ticket"
    TICKET_NOW=$ticket
    if ((TASKS > 0 || SLURM_JOB_NUM_NODES < WANT_NODES)) && [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
        echo "handed over to job $(submit "$0" "$ticket")"
        return
    fi
    if [[ -z ${TICKET:-} ]]; then # sbatch was typed by hand: its output file is not in the run directory
        echo "output: $RUN_DIR/logs/$NAME-$SELF.log"
        exec >>"$RUN_DIR/logs/$NAME-$SELF.log" 2>&1
    fi
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        JOB=$(sed -n "$((OFFSET + SLURM_ARRAY_TASK_ID + 1))p" "$LIST")
    fi
    run
}

# prepare MODULE CONFIG [--key value ...]: freeze code and config; prints the ticket.
prepare() {
    local module=$1 config=$2 key value
    shift 2
    for key in NODES PROCS CPUS MINUTES PARTITION ACCOUNT; do
        value=${!key:-}
        [[ $key == PROCS ]] && key=processes
        [[ -z $value ]] || set -- "$@" "--launch.${key,,}" "$value"
    done
    [[ -z ${GPUS:-} ]] || set -- "$@" --launch.gpus 1 --launch.processes "$GPUS"
    "$PYTHON" -m fine_dist.submit ${SPREAD:+--spread} prepare "$module" --config "$config" "$@"
}

# submit SCRIPT TICKET [sbatch options]: prints the job ids, joined by colons. A fan-out becomes arrays, chunked because
# MaxArraySize bounds the index.
submit() (
    local script=$1 ticket=$2 limit offset count ids=()
    shift 2
    # shellcheck source=/dev/null
    source "$ticket"
    # shellcheck disable=SC2046 # a job submitted from a job must not inherit its SLURM_* words
    unset $(compgen -v SLURM_ | grep -v '^SLURM_CONF$')
    if ((TASKS == 0)); then
        [[ -n $JOB ]] || return 0
        TICKET=$ticket FINE_DIST_CODE=$CODE sbatch --parsable "${FLAGS[@]}" "--job-name=$NAME" "--comment=$ticket" \
            "--output=$RUN_DIR/logs/%x-%j.log" "$@" "$script"
        return
    fi
    limit=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
    for ((offset = 0; offset < TASKS; offset += limit)); do
        count=$((TASKS - offset < limit ? TASKS - offset : limit))
        ids+=("$(TICKET=$ticket FINE_DIST_CODE=$CODE OFFSET=$offset sbatch --parsable "${FLAGS[@]}" "--job-name=$NAME" "--comment=$ticket" \
            "--array=0-$((count - 1))${PARALLEL:+%$PARALLEL}" "--output=$RUN_DIR/logs/%x-%A_%a.log" "$@" "$script")")
    done
    IFS=:
    echo "${ids[*]}"
)

# resubmit: this job again, with a new id; prints it.
resubmit() (
    local again=(--parsable "${FLAGS[@]}" "--job-name=$NAME" "--comment=$TICKET_NOW")
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

# run: the job in JOB on all nodes of this allocation; ends the script.
run() {
    local code=0 told=0 pid
    export JOB PROCS PYTHON MASTER_ADDR MASTER_PORT FINE_DIST_EXIT_FILE="$RUN_DIR/jobs/.exit-$SLURM_JOB_ID"
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    # As fine_dist.core.processes.derived_port: below the ports that the system hands out, of this job alone.
    MASTER_PORT=$((20000 + SLURM_JOB_ID * 131 % 10000))
    rm -f "$FINE_DIST_EXIT_FILE"
    cd "$CODE" || exit 2
    # Only this shell gets USR1 (--signal=B:USR1@...), and passes it on so that the workers can save.
    trap 'told=1; kill -USR1 "$pid" 2>/dev/null' USR1
    if [[ -n $SPREAD ]]; then
        "$PYTHON" -m fine_dist.submit spread "$JOB" &
    else
        step &
    fi
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" && code=0 || code=$?
    done
    [[ ! -s $FINE_DIST_EXIT_FILE ]] || code=75
    if ((code == 75)) && [[ -e $RUN_DIR/STOP || -e $RUN_DIR/STOPPED ]]; then
        echo "stopped by a file STOP; the same command continues it" >&2
    elif ((code == 75 || (code != 0 && told))); then
        requeue
    fi
    exit "$code"
}

# step: one torchrun a node.
step() {
    # shellcheck disable=SC2016 # expanded on the nodes
    exec srun "${SRUN_SITE[@]}" --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$ON_NODE"'
        if ((SLURM_JOB_NUM_NODES * PROCS == 1)); then exec $CONTAINER_EXEC "$PYTHON" -m fine_dist.worker "$JOB"; fi
        trap "" USR1 # srun passes it to every process of the step; torchrun would die of it
        exec $CONTAINER_EXEC "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$PROCS" \
            --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
            -m fine_dist.worker "$JOB"'
}

# requeue: put this job back into the queue, unless it was cancelled or has been put back too often. Where the site does
# not allow that (REQUEUE=resubmit in site.sh), submit it once more: the same ticket, and the same task of an array.
requeue() {
    local state='' restarts=$((${SLURM_RESTART_COUNT:-0} + ${RESUBMITTED:-0})) _
    for _ in {1..5}; do # a controller that restarts is asked again
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
        echo "saved; goes on as job $(RESUBMITTED=$((restarts + 1)) resubmit) (restart $((restarts + 1)) of at most $MAX_RESTARTS)"
        exit 75
    fi
    echo "saved; back into the queue (restart $((restarts + 1)) of at most $MAX_RESTARTS)"
    scontrol requeue "$SELF"
    exit 75
}
