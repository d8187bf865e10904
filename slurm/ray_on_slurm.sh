#!/usr/bin/env bash
# Start a private Ray cluster in this allocation and run a command on it:
#
#   sbatch --nodes=4 slurm/ray_on_slurm.sh python -m fine_dist.init --config configs/init/dit_b_family.yaml
#
# Settings: those of env.sh, and NODE_IP, a command that prints the address of the node it runs on (default: the address
# of IFNAME, or the first of `hostname -I`).
#SBATCH --job-name=ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
# shellcheck source=slurm/env.sh
source "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"
SELF=$SLURM_JOB_ID
default="hostname -I | cut -d' ' -f1"
[[ -z ${IFNAME:-} ]] || default="ip -4 -o addr show $IFNAME | awk '{print \$4}' | cut -d/ -f1"
export NODE_IP=${NODE_IP:-$default} RAY_USAGE_STATS_ENABLED=0 PYTHON
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Three ports from here on, derived from the job's id and below 10002, where the ports of Ray's workers begin.
PORT=$((6000 + SLURM_JOB_ID % 1000 * 4))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
ADDRESS=$(srun "$EXPORT" --nodes=1 --ntasks=1 --nodelist="$HEAD" bash -c "$NODE_IP"):$PORT
pids=()

# start NODES [srun options] -- [ray options]: run Ray on that many nodes, with a folder for each, until the step ends.
start() {
    local nodes=$1 where=()
    shift
    while [[ $1 != -- ]]; do where+=("$1") && shift; done
    # shellcheck disable=SC2016 # expanded on the nodes
    srun "$EXPORT" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 "${where[@]}" bash -c '
        folder=/tmp/ray-$SLURM_JOB_ID-$(hostname -s) # short, because paths of Unix sockets are limited to 107 bytes
        mkdir -p "$folder"
        exec "$PYTHON" -m ray.scripts.scripts start --block --temp-dir="$folder" --node-ip-address="$(eval "$NODE_IP")" \
            --dashboard-agent-listen-port=0 --num-cpus="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
            --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@"' start "${@:2}" &
    pids+=("$!")
}

# shellcheck disable=SC2317 # called by the trap
finish() {
    kill -TERM "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
    srun "$EXPORT" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "rm -rf /tmp/ray-$SLURM_JOB_ID-*" || true
}
trap finish EXIT

start 1 --nodelist="$HEAD" -- --head --port="$PORT" --ray-client-server-port=$((PORT + 1)) --include-dashboard=false \
    --dashboard-port=$((PORT + 2))
until (exec 3<>"/dev/tcp/${ADDRESS%:*}/$PORT") 2>/dev/null; do
    kill -0 "${pids[0]}" 2>/dev/null || exit 1
    sleep 0.5
done
if ((SLURM_JOB_NUM_NODES > 1)); then
    start $((SLURM_JOB_NUM_NODES - 1)) --exclude="$HEAD" -- --address="$ADDRESS"
fi
export RAY_ADDRESS=$ADDRESS
"$PYTHON" -m fine_dist.launchers.local_ray --await-nodes "$SLURM_JOB_NUM_NODES"
signaled=0 code=0
"$@" &
command=$!
# The workers of Ray end with the command. A requeued job continues from what they have saved.
trap 'signaled=1; kill -TERM "$command" 2>/dev/null' USR1
while kill -0 "$command" 2>/dev/null; do
    wait "$command" && code=0 || code=$?
done
if ((code == 75 || (code != 0 && signaled))); then
    requeue
fi
exit "$code"
