"""Many programs from one import of torch and DeepSpeed: each starts in a tenth of a second instead of some."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """One run after the other; exit codes of all ranks, and what they printed."""
    todo = [_described(run, folder / f"{name}.txt") for name, run in runs.items()]
    (folder / "runs.json").write_text(json.dumps(todo))
    done = subprocess.run(
        [sys.executable, str(WORKERS / "forked_runs.py"), str(folder / "runs.json")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    return {name: Ended(code, (folder / f"{name}.txt").read_text()) for name, code in zip(runs, codes, strict=True)}


def run_all_well(folder: Path, runs: Mapping[str, Run | Sampling], timeout: float = 900) -> None:
    """As `run_all`, and every rank must end with 0."""
    for name, ended in run_all(folder, runs, timeout).items():
        assert not any(ended.codes), (name, ended.codes, ended.output[-3000:])


def _described(run: Run | Sampling, output: Path) -> dict[str, Any]:
    return {"program": run.program, "world_size": run.processes, "argv": run.argv, "output": str(output)}
