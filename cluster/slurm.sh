#!/usr/bin/env bash
# Runs an experiment on the nodes of a Slurm job. From a folder that all nodes share:
#
#   sbatch --partition=PARTITION cluster/slurm.sh experiment.yaml
#
# TUNERY_STORE (default /shared/store) is the store and TUNERY_ENV (default .venv) the environment with tunery, on all
# nodes. When Slurm announces the time limit or a preemption, the run saves its state and the job is requeued; a requeued
# job resumes. `scancel --batch --signal=TERM JOB` saves the state and ends the job.
#
#SBATCH --job-name=tunery
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#
# Whole nodes: `ray symmetric-run` ends with `ray stop`, which stops every Ray of this user on the node.
#SBATCH --exclusive
#
# Seconds before the time limit at which this script receives SIGUSR1. A preemption sends it too, if the cluster has
# PreemptParameters=send_user_signal; without, a preempted job resumes from its last checkpoint.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch --partition=PARTITION $0 EXPERIMENT.yaml" >&2
    exit 2
fi
store=${TUNERY_STORE:-/shared/store}
environment=${TUNERY_ENV:-$SLURM_SUBMIT_DIR/.venv}
export PATH=$environment/bin:$PATH

# The job's folder, with the token: whoever has it runs code as this user.
export TUNERY_JOB=$SLURM_SUBMIT_DIR/.tunery-slurm-$SLURM_JOB_ID
rm -rf -- "$TUNERY_JOB" # of an attempt that was killed
mkdir -m 700 -- "$TUNERY_JOB"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$TUNERY_JOB/token")
unset RAY_AUTH_TOKEN # Ray would prefer it
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$TUNERY_JOB/token

# The first node, on which this script runs, is the head. Not its name: where that resolves to a loopback address on the
# node itself, no node would consider itself the head.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(getent ahostsv4 "${nodes[0]}" | awk '$1 !~ /^127\./ { print $1; exit }')
ip=${ip:-$(hostname -I | awk '{ print $1 }')}

# Ports below those that Linux assigns to clients (32768 and above), other ones for each job.
port=$((20000 + SLURM_JOB_ID % 4000 * 3))
# Without RAY_ADDRESS `ray symmetric-run` would not find a cluster whose temporary directory is not the default, and
# tunery would start a Ray of its own.
export RAY_ADDRESS=$ip:$port
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds; imports from a shared file system take longer than 30
export RAY_gcs_rpc_server_reconnect_timeout_s=20 # how long the other nodes outlive the head; 60 when not given
export RAY_USAGE_STATS_ENABLED=0
# Short, because the paths of Ray's sockets have at most 107 bytes. Ray makes its own folder accessible to all users, so
# it is inside one that is not.
export TUNERY_TEMP=/tmp/tunery-$SLURM_JOB_ID

# The commands of each node; those after `--` run on the head only. They write the driver's process id, which this
# script signals: `ray symmetric-run` kills the driver when it is itself interrupted.
# shellcheck disable=SC2016
on_each_node='
    ((SLURM_NODEID == 0)) || exec >"$TUNERY_JOB/node-$SLURM_NODEID.log" 2>&1 # long, and the end of the head is an error
    mkdir -m 700 "$TUNERY_TEMP" 2>/dev/null || [[ -d $TUNERY_TEMP && -O $TUNERY_TEMP && ! -L $TUNERY_TEMP ]] || exit 1
    chmod 700 "$TUNERY_TEMP"
    trap "rm -rf -- \"\$TUNERY_TEMP\"" EXIT
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" --temp-dir="$TUNERY_TEMP/ray" \
        --dashboard-host=127.0.0.1 --dashboard-port="$1" --dashboard-agent-listen-port="$2" \
        --num-cpus="$3" --no-monitor -- "${@:4}"
'
# The exit code of `ray symmetric-run` (2.60) on several nodes is not that of the driver: it is itself connected to the
# Ray that it stops.
# shellcheck disable=SC2016
driver='
    tunery run "$@" &
    echo $! >"$TUNERY_JOB/driver.pid"
    wait $! && status=0 || status=$?
    echo "$status" >"$TUNERY_JOB/driver.status"
    exit "$status"
'

signalled='' requeue=''
# shellcheck disable=SC2329 # called by traps
stop_run() { # the driver saves its state; srun is stopped if there is no driver yet
    signalled=yes
    local pid=$step
    if [[ -s $TUNERY_JOB/driver.pid ]]; then
        pid=$(<"$TUNERY_JOB/driver.pid")
    fi
    kill -TERM "$pid" 2>/dev/null || true
}
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} # srun takes it from the job no longer (Slurm 22.05 and newer)
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    bash -c "$on_each_node" node "$((port + 1))" "$((port + 2))" "$cpus" \
    bash -c "$driver" driver "$@" --store "$store" &
step=$!
trap 'requeue=yes; stop_run' USR1
trap stop_run TERM INT
while true; do # a signal interrupts `wait`
    signalled='' status=0
    wait "$step" || status=$?
    if [[ -z $signalled ]]; then
        break
    fi
done
if [[ -s $TUNERY_JOB/driver.status ]]; then
    status=$(<"$TUNERY_JOB/driver.status")
fi
rm -f -- "$TUNERY_JOB/token" "$TUNERY_JOB/driver."*
if [[ -n $requeue ]] && ((status >= 128)); then
    scontrol requeue "$SLURM_JOB_ID"
elif ((status == 0 || ${#nodes[@]} == 1)); then
    rm -rf -- "$TUNERY_JOB"
else
    echo "output of the other nodes: $TUNERY_JOB" >&2
fi
exit "$status"
