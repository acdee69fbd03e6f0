"""Many training runs from one import of torch and DeepSpeed: each starts in a tenth of a second instead of some."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from launching import ROOT, WORKERS, environment


class Run(NamedTuple):
    """Arguments of switchdit/train.py, on ``processes`` CPU processes."""

    processes: int
    config: Path
    deepspeed: Path | str = "ds_configs/zero2_fp32.json"
    more: tuple[str, ...] = ()


class Ended(NamedTuple):
    codes: list[int]
    output: str


def run_all(folder: Path, runs: dict[str, Run], timeout: float = 600) -> dict[str, Ended]:
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


def run_all_well(folder: Path, runs: dict[str, Run], timeout: float = 600) -> None:
    """As `run_all`, and every rank must end with 0."""
    for name, ended in run_all(folder, runs, timeout).items():
        assert not any(ended.codes), (name, ended.codes, ended.output[-3000:])


def _described(run: Run, output: Path) -> dict[str, Any]:
    argv = ["--config", str(run.config), "--deepspeed_config", str(run.deepspeed), *run.more]
    return {"world_size": run.processes, "argv": argv, "output": str(output)}
