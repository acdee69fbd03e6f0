#!/usr/bin/env bash
# Start a program on the machines that slurm gives, and queue the job again until the program has finished:
#
#   sbatch --nodes=2 launchers/slurm.sh switchdit/train.py --config switchdit/configs/X.yaml \
#       --deepspeed_config ds_configs/Y.json
#
# Training continues from the run's newest checkpoint (--resume auto is added). Two minutes before the job's time ends
# slurm sends SIGUSR1 to the processes; training saves and ends with code 75, and the job goes back into the queue under
# its number. So it does after a fault, up to RESTARTS times without a new checkpoint. Finished runs, mistakes and scancel
# end it.
# slurm's options may be given to sbatch or written below.
#
#   GPUS_PER_NODE    processes per node (default: what slurm reports, or 8); srun starts each of them
#   RESTARTS         faults without a new checkpoint between them after which the job is not queued again (default: 5)
#   SLURM_WAIT       seconds from the end of the first process of a training until those that are stuck are killed
#                    (default: 300, more than any of them takes to end by itself; 0: never)
#   MASTER_PORT      port on which the processes meet (default: derived from the job's number)
#   OMP_NUM_THREADS  threads of each process (default: 4)
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_DEBUG  reach all processes as they are
#
#SBATCH --job-name=switchdit
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -euo pipefail
# slurm runs a copy of this file; the folder it was submitted from is the repository's
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[ $# -gt 0 ] || { sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is not a slurm job; submit it with sbatch, or use single_node.sh" >&2; exit 2; }
[ -f "$1" ] || { echo "error: '$1' does not exist in $PWD; submit from the repository's folder" >&2; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH
. launchers/restarts.sh

per_node=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}} RESTARTS=${RESTARTS:-5}
whole GPUS_PER_NODE "$per_node" 1
whole RESTARTS "$RESTARTS" 0
export MASTER_ADDR MASTER_PORT
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
    { echo "error: scontrol cannot name the machines of '$SLURM_JOB_NODELIST'" >&2; exit 1; }
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8} # srun does not take it over from sbatch by itself
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}
with_resume "$@"
set -- "${words[@]}"
case $1 in
    switchdit/train.py | */switchdit/train.py) trains=yes wait=${SLURM_WAIT:-300} ;;
    *) trains='' wait=${SLURM_WAIT:-0} ;; # of some programs the last part is rank 0's work alone
esac
echo "+ $SLURM_NNODES nodes x $per_node processes, meeting at $MASTER_ADDR:$MASTER_PORT, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"

# the name of the run's newest checkpoint
newest_checkpoint() {
    [ -n "$trains" ] && python -c 'if True:
        from switchdit.config import load_config
        from switchdit.train import arguments
        args = arguments()
        print(open(load_config(args.config, args.overrides).run_dir + "/checkpoints/latest").read())' "${@:2}" 2>/dev/null
}

# Each task is a worker itself, so that slurm's signals reach it. A task that ends leaves the others alone: they end by
# themselves, with the code that tells what happened. What is stopped, or waits for a disk that is gone, never would.
code=0
srun --kill-on-bad-exit=0 --wait="$wait" --nodes="$SLURM_NNODES" --ntasks="$((SLURM_NNODES * per_node))" \
    --ntasks-per-node="$per_node" bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        LOCAL_WORLD_SIZE=$0 exec python -u "$@"' "$per_node" "$@" || code=$?

# slurm's own count of restarts holds those after a saved stop, which may be many
faults=slurm-$SLURM_JOB_ID.faults
case $code in
    0 | 2 | 130)
        rm -f "$faults"
        exit "$code"
        ;;
    75)
        rm -f "$faults"
        echo "stopped with everything saved: job $SLURM_JOB_ID goes back into the queue"
        ;;
    *)
        newest=$(newest_checkpoint "$@") || newest=none
        [[ ! -f $faults || $(tail -n 1 "$faults") == *"newest checkpoint: $newest" ]] || rm "$faults" # it has got further
        echo "start $((${SLURM_RESTART_COUNT:-0} + 1)): $(described "$code"); newest checkpoint: $newest" >>"$faults"
        count=$(wc -l <"$faults")
        if [ "$count" -gt "$RESTARTS" ]; then
            echo "error: the program ended with $(described "$code"), fault $count without a new checkpoint, RESTARTS is $RESTARTS: the job ends" >&2
            rm -f "$faults"
            exit "$code"
        fi
        echo "the program ended with $(described "$code"), restart $count of $RESTARTS: job $SLURM_JOB_ID goes back into the queue" >&2
        ;;
esac
scontrol requeue "$SLURM_JOB_ID" || { echo "error: slurm did not queue job $SLURM_JOB_ID again; submit it once more" >&2; exit "$code"; }
