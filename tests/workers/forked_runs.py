"""Training and sampling, one run after the other, from one import of everything, until standard input ends.

A line of it is a run: {"program": "train", "world_size": 2, "argv": ["--config", ...], "output": "file"}; what is
printed after it are the exit codes of its ranks. Each rank writes into a file of its own, "file.RANK"; all together are
then "file".
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from forked_run import fork_rank, prepare
from launching import free_port

prepare()
for line in sys.stdin:
    run = json.loads(line)
    ranks, port = range(run["world_size"]), free_port()
    outputs = [Path(f"{run['output']}.{rank}") for rank in ranks]
    pids = [fork_rank(rank, len(ranks), port, run["argv"], outputs[rank], run["program"]) for rank in ranks]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    Path(run["output"]).write_text("".join(output.read_text(errors="replace") for output in outputs))
    print(json.dumps(codes), flush=True)
