"""Start programs as users do: with the deepspeed launcher, on CPU processes that talk over gloo."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = Path(__file__).parent / "workers"
GIVEN, GIVING = deque(maxlen=100), threading.Lock()  # ports


def free_port() -> int:
    """For a launcher, which takes it seconds later: none of those that the system gives to others meanwhile.

    Nor one that was given a while ago: whose processes may still be on their way to it.
    """
    first = 15_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = first + secrets.randbelow(1_000)
        with GIVING:
            if port in GIVEN:
                continue
            with contextlib.suppress(OSError), socket.socket() as s:
                s.bind(("127.0.0.1", port))
                GIVEN.append(port)
                return port


def launch_command(num_processes: int, script: str | Path, *arguments: object) -> list[str]:
    """With the deepspeed launcher; one process needs none."""
    if num_processes == 1:
        return [sys.executable, str(script), *map(str, arguments)]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    options = ["--num_accelerators", str(num_processes), "--master_port", str(free_port())]
    return [launcher, *options, str(script), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """Without ranks of an outer launcher, one thread a process."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}


def launch(num_processes: int, script: str | Path, *arguments: object, timeout: float = 900, **variables: str):
    """Run to the end and return the completed process with its output as text."""
    command = launch_command(num_processes, script, *arguments)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks = {**alone, "MASTER_PORT": str(free_port())} if num_processes == 1 else {}
    return subprocess.run(
        command, cwd=ROOT, env=environment(**ranks, **variables), capture_output=True, text=True, timeout=timeout
    )


def launched(num_processes: int, script: str | Path, *arguments: object, timeout: float = 900, **variables: str):
    """As `launch`, and the program must succeed."""
    done = launch(num_processes, script, *arguments, timeout=timeout, **variables)
    assert done.returncode == 0, (
        f"{done.args} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done


def told_of_mistakes(program: str, command_lines: list[list[str]]) -> list[str]:
    """The one line that switchdit/``program``.py prints before exit code 2, for each list of arguments."""
    done = subprocess.run(
        [sys.executable, WORKERS / "mistakes.py", program, json.dumps(command_lines)],
        cwd=ROOT,
        env=environment(MASTER_PORT=str(free_port())),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.rpartition("RESULTS")[2])
    for end in ends:
        assert end["code"] == 2, end["stderr"]
        assert end["stderr"].startswith("error: ")
        assert end["stderr"].count("\n") == 1, end["stderr"]
    return [end["stderr"].rstrip() for end in ends]
