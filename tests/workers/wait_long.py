"""Two processes meet in groups that would give up after a second; the second comes after two."""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parents[2])

from switchdit.engine.engine import init_processes, leave, wait_long

processes = init_processes()
groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0])]
for group in groups[: 3 if processes.is_first else 2]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
wait_long()
for group in groups[:2]:
    if not processes.is_first:
        time.sleep(2)
    dist.barrier(group)
leave()
