"""Start programs as users do: with the deepspeed launcher, on CPU processes that talk over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = Path(__file__).parent / "workers"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch_command(num_processes: int, script: str | Path, *arguments: object) -> list[str]:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    options = ["--num_accelerators", str(num_processes), "--master_port", str(free_port())]
    return [launcher, *options, str(script), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """Without ranks of an outer launcher, one thread a process."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}


def launch(num_processes: int, script: str | Path, *arguments: object, timeout: float = 240, **variables: str):
    """Run to the end and return the completed process with its output as text."""
    command = launch_command(num_processes, script, *arguments)
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=timeout
    )


def launched(num_processes: int, script: str | Path, *arguments: object, timeout: float = 240, **variables: str):
    """As `launch`, and the program must succeed."""
    done = launch(num_processes, script, *arguments, timeout=timeout, **variables)
    assert done.returncode == 0, (
        f"{done.args} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done
