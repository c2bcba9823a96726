#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, for trying `tunery submit` and for tests. Each node is a raylet with
# its own ports and resources; the head has the dashboard with the Jobs API on loopback. A token is required.
#
#   cluster/local.sh start [NODES [CPUS]]   # 3 nodes with 2 CPUs each when not given; prints variables to export
#   cluster/local.sh stop
#
# State is in $TUNERY_CLUSTER (default: ~/.cache/tunery-cluster): the token, process ids, logs, and the address for
# RAY_ADDRESS. Ray's own files are in a folder in /tmp with a short name, because the paths of its sockets have at most
# 107 bytes.
set -euo pipefail

state=${TUNERY_CLUSTER:-$HOME/.cache/tunery-cluster}
ray=$(command -v "${RAY:-ray}")
PATH=$(dirname "$ray"):$PATH # jobs run the `python` beside it
seconds=60

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_node() { # NAME WORDS...: start a node in its own session and wait until it has joined
    local name=$1
    shift
    setsid "$ray" start --block --disable-usage-stats --node-name="$name" "$@" >"$state/$name.log" 2>&1 </dev/null &
    echo $! >>"$state/pids"
    for ((i = 0; i < seconds * 5; i++)); do
        grep -q 'Ray runtime started' "$state/$name.log" && return
        if ! kill -0 $! 2>/dev/null; then
            break
        fi
        sleep 0.2
    done
    echo "error: node $name did not start" >&2
    tail -n 20 "$state/$name.log" >&2
    stop
    exit 1
}

start() {
    local nodes=${1:-3} cpus=${2:-2} port dashboard temp
    if [[ -s $state/pids ]]; then
        echo "error: a cluster is running: $state/pids" >&2
        echo "remedy: stop it with $0 stop" >&2
        exit 1
    fi
    mkdir -p "$state"
    chmod 700 "$state"
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token")
    temp=$(mktemp -d /tmp/ray-XXXX)
    echo "$temp" >"$state/temp"
    port=$(free_port)
    dashboard=$(free_port)
    echo "127.0.0.1:$port" >"$state/address"
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token"
    start_node node-0 --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --dashboard-agent-listen-port="$(free_port)" --node-ip-address=127.0.0.1 --num-cpus="$cpus" \
        --object-store-memory=300000000 --temp-dir="$temp"
    for ((node = 1; node < nodes; node++)); do
        start_node "node-$node" --address="127.0.0.1:$port" --node-ip-address=127.0.0.1 --num-cpus="$cpus" \
            --object-store-memory=300000000 --dashboard-agent-listen-port="$(free_port)"
    done
    echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token"
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard"
}

stop() {
    if [[ -f $state/pids ]]; then
        while read -r pid; do
            kill -TERM -- "-$pid" 2>/dev/null || true
        done <"$state/pids"
        sleep 1
        while read -r pid; do
            kill -KILL -- "-$pid" 2>/dev/null || true
        done <"$state/pids"
    fi
    if [[ -f $state/temp ]]; then
        rm -rf -- "$(cat "$state/temp")"
    fi
    rm -f "$state/pids" "$state/temp" "$state/token" "$state/address"
}

case ${1:-} in
start)
    shift
    start "$@"
    ;;
stop) stop ;;
*) usage ;;
esac
