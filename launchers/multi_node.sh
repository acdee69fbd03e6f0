#!/usr/bin/env bash
# Start a program on several machines that a hostfile lists. Run this on the first of them; it reaches the others
# through ssh without a password (pdsh), and all must see this folder and the run's folder under the same paths.
#
#   launchers/multi_node.sh switchdit/train.py --config switchdit/configs/X.yaml --deepspeed_config ds_configs/Y.json
#
#   HOSTFILE         lines such as "node1 slots=8" (default: hostfile, in this folder)
#   MASTER_ADDR      name of the first machine as the others reach it (default: the first line's)
#   MASTER_PORT      port on which the processes meet (default: 29500)
#   RESTARTS         how often a training that a fault has ended starts again from its newest checkpoint (default: 0);
#                    without ssh give the same number on each machine
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ...  are passed on to the others if they are written in ~/.deepspeed_env
#
# Without ssh between the machines, start this on each of them with:
#   NODE_RANK        0 on the first, 1 on the second, ... ; MASTER_ADDR is then required
#   GLOO_SOCKET_IFNAME  network interface of CPU processes (default: the one that leads to MASTER_ADDR)
#
# SIGTERM and SIGUSR1 reach the processes of this machine: training saves everywhere, and this script ends with code 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH
command -v deepspeed >/dev/null || { echo "error: no 'deepspeed' on the PATH; 'make setup' installs it into .venv" >&2; exit 2; }
. launchers/restarts.sh

HOSTFILE=${HOSTFILE:-hostfile} MASTER_PORT=${MASTER_PORT:-29500} RESTARTS=${RESTARTS:-0}
whole RESTARTS "$RESTARTS" 0
[ -f "$HOSTFILE" ] || { echo "error: HOSTFILE '$HOSTFILE' does not exist; it needs lines such as 'node1 slots=8'" >&2; exit 2; }
hosts=$(awk '!/^[[:space:]]*(#|$)/ {print $1}' "$HOSTFILE")
[ -n "$hosts" ] || { echo "error: HOSTFILE '$HOSTFILE' lists no machine" >&2; exit 2; }

# the interface that holds an address, or that leads to it; nothing where the address is this machine's loopback
interface_to() {
    local address
    address=$(getent ahosts "$1" | awk '{print $1; exit}')
    { ip -o addr show to "$address" | awk '{print "dev", $2}'; ip -o route get "$address"; } 2>/dev/null |
        awk '{for (i = 1; i < NF; i++) if ($i == "dev" && $(i + 1) != "lo") {print $(i + 1); exit}}'
}

# beyond ssh the processes of this machine are no descendants of this script
remote_workers() {
    local launch
    launch=$(pgrep -d, -u "$(id -u)" -f -- "deepspeed.launcher.launch .*--master_port=$MASTER_PORT ") &&
        pgrep -P "$launch" -f -- '--local_rank='
}

options=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT")
if [ -n "${NODE_RANK:-}" ]; then
    whole NODE_RANK "$NODE_RANK" 0
    [ "$NODE_RANK" -lt "$(wc -l <<<"$hosts")" ] || { echo "error: NODE_RANK is $NODE_RANK, but HOSTFILE '$HOSTFILE' lists $(wc -l <<<"$hosts") machines; the first is 0" >&2; exit 2; }
    [ -n "${MASTER_ADDR:-}" ] || { echo "error: NODE_RANK needs MASTER_ADDR, the first machine's name" >&2; exit 2; }
    getent ahosts "$MASTER_ADDR" >/dev/null || { echo "error: MASTER_ADDR '$MASTER_ADDR' is no machine that this one knows; give its name or address" >&2; exit 2; }
    options+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    # gloo would ask for the address of this machine's name, which often is the loopback's
    interface=$(interface_to "$MASTER_ADDR") || interface= # no 'ip' here: gloo chooses
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
    workers=deepspeed_workers
else
    # DeepSpeed joins the words to a line for the other machines' shells, and quotes none of these
    for word in "$@"; do
        [[ $word != *[\;\&\|\<\>\(\)\{\}\$\`\\\"\'\*\?\#\%[:cntrl:]]* ]] || { echo "error: $(printf %q "$word") has a sign that the shells of the other machines would act on; write the value into the YAML file, or choose another name" >&2; exit 2; }
    done
    options+=(--master_addr "${MASTER_ADDR:-$(head -n 1 <<<"$hosts")}")
    workers=remote_workers
fi
echo "+ ${GLOO_SOCKET_IFNAME:+GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME }deepspeed ${options[*]} $*"
keep_running "$workers" deepspeed "${options[@]}" "$@"
