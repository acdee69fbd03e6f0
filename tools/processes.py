"""The processes that a launcher started for one program: who they are, what is whose, who tells of a mistake.

They talk over gloo on the host's memory, in tensors; the GPUs have nothing to say to each other here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from switchdit.errors import LOST_PEER, UserError, end

PATIENCE = timedelta(days=2)  # a process may have much more to do than the others; a dead one is noticed at once


@dataclass(frozen=True)
class Processes:
    """rank of this process, 0 .. world_size - 1, and its number among the local_size ones of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def agree(self, value: int) -> int:
        """The value that rank 0 passes, on every rank."""
        if self.world_size == 1:
            return value
        told = torch.tensor([value])
        dist.broadcast(told, src=0)
        return int(told)

    def note(self, line: str) -> None:
        """A line on stderr, from rank 0."""
        if self.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def use_all_cores(self) -> None:
        """For what rank 0 does alone, when the others of its machine have ended."""
        torch.set_num_threads(torch.get_num_threads() * self.local_size)

    def share(self, count: int, unit: int) -> tuple[int, int]:
        """The contiguous part [start, stop) of ``count`` rows that is this rank's, cut between groups of ``unit``.

        Every group is the same as in a single process, and so are numbers that depend on how rows are grouped. The
        last ranks have nothing when there are fewer groups than ranks.
        """
        groups = -(-count // unit)
        start, stop = (unit * -(-groups * rank // self.world_size) for rank in (self.rank, self.rank + 1))
        return min(start, count), min(stop, count)


@contextlib.contextmanager
def joined(local_rank: int = 0) -> Iterator[Processes]:
    """Meet the other processes of the launcher, if there are any; a GPU each, and a share of the cores.

    A `UserError` that any of them meets is told by the first that meets it, in one line, and all end.
    ``local_rank`` is taken where the environment has no LOCAL_RANK.
    """
    processes = Processes(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", local_rank)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"),
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes.local_size))
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
    if processes.world_size == 1:
        yield processes
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    except (dist.DistError, ValueError) as problem:
        reason = str(problem).split("\n")[0]
        raise UserError(f"the {processes.world_size} processes cannot meet: {reason}") from problem
    try:
        yield processes
    except UserError as mistake:
        end(str(mistake) if _is_first_to_tell(store) else None)
    except RuntimeError as problem:
        if any(sign in str(problem) for sign in LOST_PEER) and not _is_first_to_tell(store):
            end(None)
        raise
    dist.destroy_process_group()


def _is_first_to_tell(store: dist.Store) -> bool:
    try:
        return store.add("mistakes told", 1) == 1
    except RuntimeError:  # rank 0, which keeps the store, has ended, and not without a word
        return False
