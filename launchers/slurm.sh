#!/usr/bin/env bash
# Start a program on the machines that slurm gives:
#
#   sbatch --nodes=2 launchers/slurm.sh switchdit/train.py --config switchdit/configs/X.yaml \
#       --deepspeed_config ds_configs/Y.json --resume auto
#
# One task per node starts that node's processes; slurm's options may be given to sbatch or written below.
#
#   GPUS_PER_NODE    processes per node (default: what slurm reports, or 8)
#   MASTER_PORT      port on which the processes meet (default: derived from the job's number)
#   OMP_NUM_THREADS  threads of each process (default: 4)
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_DEBUG  reach all tasks as they are
#
#SBATCH --job-name=switchdit
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -euo pipefail
# slurm runs a copy of this file; the folder it was submitted from is the repository's
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[ $# -gt 0 ] || { sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is not a slurm job; submit it with sbatch, or use single_node.sh" >&2; exit 2; }
[ -f "$1" ] || { echo "error: '$1' does not exist in $PWD; submit from the repository's folder" >&2; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH

per_node=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64} # srun does not take it over from sbatch by itself
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}
echo "+ $SLURM_NNODES nodes x $per_node processes, meeting at $master:$port: $*"
# torchrun sets the same variables as DeepSpeed's launcher and needs no ssh between the nodes
exec srun --kill-on-bad-exit=1 bash -c \
    'exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$0" --node_rank "$SLURM_NODEID" \
        --master_addr "$1" --master_port "$2" "${@:3}"' "$per_node" "$master" "$port" "$@"
