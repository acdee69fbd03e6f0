"""A run's folder: what it holds, when it may be used, and what is written there before the first step.

<run_dir>/config.yaml  deepspeed_config.json  version.json  log.jsonl  checkpoints/  tensorboard/
"""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml

import switchdit
from switchdit.config import Config, config_to_dict
from switchdit.engine.checkpoint import complete_checkpoints, find_checkpoint, remove_partial_checkpoints
from switchdit.engine.engine import Processes, barrier
from switchdit.errors import UserError
from switchdit.files import atomic_write, write_json


@dataclass(frozen=True)
class Run:
    path: Path
    resume_from: Path | None  # a whole checkpoint

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def open_run(config: Config, deepspeed_config: dict[str, Any], processes: Processes, resume: str | None) -> Run:
    """Choose where to continue and write down what is run; collective.

    Args:
        resume: None, ``"auto"`` (the newest whole checkpoint of the run, or a fresh start), or a checkpoint's path.

    Raises:
        UserError: if the folder already holds checkpoints and ``resume`` is None, or a named checkpoint is not whole.
    """
    path = Path(config.run_dir)
    existing = complete_checkpoints(path / "checkpoints")
    if resume is None and existing:
        raise UserError(
            f"run_dir '{path}' already holds checkpoints up to {existing[-1].name}; "
            "continue with --resume auto, or choose another run_dir"
        )
    if resume == "auto":
        resume_from = existing[-1] if existing else None
    else:
        resume_from = find_checkpoint(resume) if resume else None
    barrier()  # every process has looked before the first one writes
    if processes.is_first:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_partial_checkpoints(path / "checkpoints")
        with atomic_write(path / "config.yaml", "w") as file:
            yaml.safe_dump(config_to_dict(config), file, sort_keys=False)
        write_json(path / "deepspeed_config.json", deepspeed_config)
        write_json(path / "version.json", {**versions(), "command": sys.argv, "processes": processes.world_size})
    barrier()
    return Run(path, resume_from)


def versions() -> dict[str, str]:
    """Of the code and of what it runs on."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match", ""]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "switchdit": switchdit.__version__,
        "git_revision": revision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
