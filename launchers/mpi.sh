#!/usr/bin/env bash
# Start a program with the mpiexec of Open MPI, MPICH or Intel MPI, which starts the processes, on this machine or on
# several; they talk over NCCL or gloo, not MPI. All machines must see this folder and the run's folder under the same
# paths.
#
#   NPROC=16 HOSTFILE=hosts launchers/mpi.sh switchdit/train.py --config switchdit/configs/X.yaml \
#       --deepspeed_config ds_configs/Y.json
#
#   NPROC            processes on all machines together (required)
#   HOSTFILE         lines as this MPI wants them: "node1 slots=8" (Open MPI) or "node1:8" (MPICH, Intel MPI)
#                    (default: none; all processes run where mpiexec puts them)
#   MASTER_ADDR      name of the machine of rank 0 as the others reach it (default: the first of HOSTFILE, or 127.0.0.1)
#   MASTER_PORT      port on which the processes meet (default: 29500)
#   MPIEXEC          the command with its own options, e.g. "mpiexec --mca btl_tcp_if_include eth0" (default: mpiexec)
#   OMP_NUM_THREADS  threads of each process (default: 4)
#   DS_ACCELERATOR   cuda or cpu (default: what each machine has)
#   RESTARTS         how often a training that a fault has ended starts again from its newest checkpoint (default: 0)
#
# SIGTERM and SIGUSR1 reach the processes: training saves, and this script ends with code 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH
. launchers/restarts.sh

read -ra mpiexec <<<"${MPIEXEC:-mpiexec}" # not mpirun: Intel's is a shell script that does not pass signals on
command -v "${mpiexec[0]}" >/dev/null || { echo "error: no '${mpiexec[0]}' on the PATH; load an MPI, or name its command in MPIEXEC" >&2; exit 2; }
RESTARTS=${RESTARTS:-0}
whole NPROC "${NPROC:-}" 1
whole RESTARTS "$RESTARTS" 0
first=127.0.0.1 options=(-n "$NPROC")
if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || { echo "error: HOSTFILE '$HOSTFILE' does not exist; it needs a line for each machine" >&2; exit 2; }
    first=$(awk '!/^[[:space:]]*(#|$)/ {sub(/:.*/, "", $1); print $1; exit}' "$HOSTFILE")
    [ -n "$first" ] || { echo "error: HOSTFILE '$HOSTFILE' lists no machine" >&2; exit 2; }
    options+=(-machinefile "$HOSTFILE")
fi
# Open MPI (variables of version 4, and of 5) and Intel MPI would bind each process, with all its threads, to few cores
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none I_MPI_PIN=0
settings=(MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT="${MASTER_PORT:-29500}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}")
[ -z "${DS_ACCELERATOR:-}" ] || settings+=(DS_ACCELERATOR="$DS_ACCELERATOR")
echo "+ ${mpiexec[*]} ${options[*]} (${settings[*]}) $*"
# what each MPI calls the rank, the number of processes, and the same within the machine: Open MPI, then the others
keep_running mpi_workers "${mpiexec[@]}" "${options[@]}" env "${settings[@]}" bash -c '
    export RANK=${OMPI_COMM_WORLD_RANK:-$PMI_RANK} WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-$PMI_SIZE}
    export LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-$MPI_LOCALRANKID}
    export LOCAL_WORLD_SIZE=${OMPI_COMM_WORLD_LOCAL_SIZE:-$MPI_LOCALNRANKS}
    if [ -z "$RANK" ] || [ -z "$WORLD_SIZE" ] || [ -z "$LOCAL_RANK" ]; then
        [ "${RANK:-0}" -ne 0 ] || echo "error: this mpiexec gives its processes no rank, or none within their machine;" \
            "Open MPI, MPICH (Hydra) and Intel MPI do" >&2
        exit 2
    fi
    exec "$0" -u "$@"' "$(command -v python)" "$@"
