#!/usr/bin/env bash
# Start a program on several machines that a hostfile lists. Run this on the first of them; it reaches the others
# through ssh without a password (pdsh), and all must see this folder and the run's folder under the same paths.
#
#   launchers/multi_node.sh switchdit/train.py --config switchdit/configs/X.yaml --deepspeed_config ds_configs/Y.json
#
#   HOSTFILE         lines such as "node1 slots=8" (default: hostfile, in this folder)
#   MASTER_ADDR      name of the first machine as the others reach it (default: the first line's)
#   MASTER_PORT      port on which the processes meet (default: 29500)
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ...  are passed on to the others if they are written in ~/.deepspeed_env
#
# Without ssh between the machines, start this on each of them with:
#   NODE_RANK        0 on the first, 1 on the second, ... ; MASTER_ADDR is then required
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH
command -v deepspeed >/dev/null || { echo "error: no 'deepspeed' on the PATH; 'make setup' installs it into .venv" >&2; exit 2; }

HOSTFILE=${HOSTFILE:-hostfile}
[ -f "$HOSTFILE" ] || { echo "error: HOSTFILE '$HOSTFILE' does not exist; it needs lines such as 'node1 slots=8'" >&2; exit 2; }
first=$(awk '!/^[[:space:]]*(#|$)/ {print $1; exit}' "$HOSTFILE")
[ -n "$first" ] || { echo "error: HOSTFILE '$HOSTFILE' lists no machine" >&2; exit 2; }

options=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    [ -n "${MASTER_ADDR:-}" ] || { echo "error: NODE_RANK needs MASTER_ADDR, the first machine's name" >&2; exit 2; }
    options+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
else
    options+=(--master_addr "${MASTER_ADDR:-$first}")
fi
echo "+ deepspeed ${options[*]} $*"
exec deepspeed "${options[@]}" "$@"
