"""What launchers tell a process about itself, in the environment: read here before torch is there to be asked."""

from __future__ import annotations

import os

# this process's rank, the number of processes, and its rank within the machine
RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed, torchrun, the scripts in launchers/
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun: not SLURM_NTASKS, which a job's shell has too
)


def rank_variables() -> tuple[str, str, str] | None:
    """Those of `RANK_VARIABLES` that are set; an empty one counts as none."""
    return next((names for names in RANK_VARIABLES if all(os.environ.get(name) for name in names)), None)


def launched_rank() -> int:
    """This process's rank as its launcher gives it; 0 without one."""
    names = rank_variables()
    return int(os.environ.get("RANK") or (os.environ[names[0]] if names else "0"))
