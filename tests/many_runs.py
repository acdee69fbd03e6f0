"""Many programs from one import of torch and DeepSpeed: each starts in a tenth of a second instead of some."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from launching import ROOT, WORKERS, environment


class Run(NamedTuple):
    """Arguments of switchdit/train.py, on ``processes`` CPU processes."""

    processes: int
    config: Path
    deepspeed: Path | str = "ds_configs/zero2_fp32.json"
    more: tuple[str, ...] = ()
    program = "train"

    @property
    def argv(self) -> list[str]:
        return ["--config", str(self.config), "--deepspeed_config", str(self.deepspeed), *self.more]


class Sampling(NamedTuple):
    """Arguments of switchdit/sample.py, on one CPU process."""

    argv: list[str]
    processes = 1
    program = "sample"


class Ended(NamedTuple):
    codes: list[int]
    output: str


def run_all(folder: Path, runs: Mapping[str, Run | Sampling], timeout: float = 900) -> dict[str, Ended]:
    """One run after the other, ``timeout`` seconds for each; exit codes of all ranks, and what they printed."""
    ended = {}
    for name, run in runs.items():
        output = folder / f"{name}.txt"
        about = {"program": run.program, "world_size": run.processes, "argv": run.argv, "output": str(output)}
        server = _server()
        server.stdin.write(json.dumps(about) + "\n")
        server.stdin.flush()
        out_of_time = threading.Timer(timeout, server.kill)
        out_of_time.start()
        answer = server.stdout.readline()
        out_of_time.cancel()
        if not answer:
            _server.cache_clear()
            pytest.fail(f"{name}: no end after {timeout} s, or a fault of tests/workers/forked_runs.py itself")
        ended[name] = Ended(json.loads(answer), output.read_text())
    return ended


@functools.cache
def _server() -> subprocess.Popen:
    """Lives as long as this process."""
    command = [sys.executable, str(WORKERS / "forked_runs.py")]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_all_well(folder: Path, runs: Mapping[str, Run | Sampling], timeout: float = 900) -> None:
    """As `run_all`, and every rank must end with 0."""
    for name, ended in run_all(folder, runs, timeout).items():
        assert not any(ended.codes), (name, ended.codes, ended.output[-3000:])
