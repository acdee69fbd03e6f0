#!/usr/bin/env bash
# Start a program (switchdit/train.py, switchdit/sample.py, tools/extract_latents.py, tools/eval_fid.py) on all devices
# of this machine.
#
#   launchers/single_node.sh switchdit/train.py --config switchdit/configs/X.yaml --deepspeed_config ds_configs/Y.json
#
# It runs in the repository's root: relative paths count from there.
#
#   NPROC            processes: one for each GPU; on a machine without one, CPU processes that talk over gloo
#                    (default: the number of GPUs, or 1)
#   CUDA_VISIBLE_DEVICES  numbers of the GPUs to use, e.g. 4,5 (default: all)
#   DS_ACCELERATOR   cuda or cpu (default: cuda where nvidia-smi lists a GPU, else cpu)
#   MASTER_PORT      port on which the processes meet (default: DeepSpeed's 29500); give each run on a machine its own
#   OMP_NUM_THREADS  threads of each process (default: cores / processes on CPU, 4 beside a GPU)
#   LOG              file that also gets everything that is printed (default: none)
#   RESTARTS         how often a training that a fault has ended starts again from its newest checkpoint (default: 0,
#                    since whoever sits before it wants to see the fault)
#
# SIGTERM and SIGUSR1 reach the processes: training saves, and this script ends with code 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH
command -v deepspeed >/dev/null || { echo "error: no 'deepspeed' on the PATH; 'make setup' installs it into .venv" >&2; exit 2; }
. launchers/restarts.sh

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
if [ -z "${DS_ACCELERATOR:-}" ]; then
    [ "$gpus" -gt 0 ] && DS_ACCELERATOR=cuda || DS_ACCELERATOR=cpu
fi
devices=
if [ "$DS_ACCELERATOR" = cuda ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    devices=$CUDA_VISIBLE_DEVICES
    [[ $devices =~ ^[0-9]+(,[0-9]+)*$ ]] || { echo "error: CUDA_VISIBLE_DEVICES is '$devices'; it must be numbers as nvidia-smi counts, e.g. 4,5; without GPUs set DS_ACCELERATOR=cpu" >&2; exit 2; }
    gpus=$(tr ',' '\n' <<<"$devices" | wc -l)
fi
unset CUDA_VISIBLE_DEVICES # the launcher would ignore it, or take it for a hostfile
[ "$DS_ACCELERATOR" = cuda ] && default=$gpus || default=1
NPROC=${NPROC:-$default} RESTARTS=${RESTARTS:-0}
whole NPROC "$NPROC" 1
whole RESTARTS "$RESTARTS" 0
if [ "$DS_ACCELERATOR" = cuda ] && [ "$gpus" -gt 0 ] && [ "$NPROC" -gt "$gpus" ]; then
    echo "error: NPROC is $NPROC, but $([ -n "$devices" ] && echo "CUDA_VISIBLE_DEVICES=$devices names" || echo "there are") $gpus GPUs; each process needs one" >&2
    exit 2
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=4
    [ "$DS_ACCELERATOR" = cuda ] || OMP_NUM_THREADS=$(( $(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1 ))
fi
export DS_ACCELERATOR OMP_NUM_THREADS

slots=(--num_accelerators "$NPROC")
[ -n "$devices" ] && slots=(--include "localhost:$(cut -d, -f1-"$NPROC" <<<"$devices")")
command=(deepspeed "${slots[@]}" ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$@")
if [ -n "${LOG:-}" ]; then
    exec > >(trap '' HUP && exec tee -ia "$LOG") 2>&1
    copier=$!
fi
echo "+ ${command[*]}"
code=0
keep_running deepspeed_workers "${command[@]}" || code=$?
if [ -n "${LOG:-}" ]; then # everything is in the file when this script ends
    exec >&- 2>&-
    wait "$copier" || true
fi
exit "$code"
