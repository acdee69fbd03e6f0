"""Training runs one after the other from one import of everything: forked_runs.py RUNS.json

RUNS.json: [{"world_size": 2, "argv": ["--config", ...], "output": "file"}, ...]; the last line has their exit codes.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from forked_run import prepare
from launching import free_port


def be_rank(rank: int, port: int, run: dict) -> None:
    code = 1
    try:
        file = os.open(run["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["world_size"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["switchdit/train.py", *run["argv"]]
        sys.modules["switchdit.train"].main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


prepare()
os.chdir(ROOT)
codes = []
for run in json.loads(Path(sys.argv[1]).read_text()):
    port, pids = free_port(), []
    for rank in range(run["world_size"]):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, port, run)
        pids.append(pid)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
print(json.dumps(codes))
