"""A run's folder: what it holds, when it may be used, and what is written there before the first step.

<run_dir>/config.yaml  deepspeed_config.json  version.json  log.jsonl  checkpoints/  tensorboard/
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml

import switchdit
from switchdit.config import Config, config_to_dict
from switchdit.engine.checkpoint import complete_checkpoints, find_checkpoint, read_state, remove_partial_checkpoints
from switchdit.errors import UserError
from switchdit.files import atomic_write, write_json


def choose_checkpoint(config: Config, resume: str | None) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start; nothing is written.

    Args:
        resume: None, ``"auto"`` (the newest whole checkpoint of the run, or a fresh start), or a checkpoint's path.

    Raises:
        UserError: if the run's folder holds checkpoints that would be mixed up, a named checkpoint is not whole, or it
            lies beyond ``train.steps``.
    """
    path = Path(config.run_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir '{path}' is a file")
    existing = complete_checkpoints(path / "checkpoints")
    if resume is None:
        if existing:
            raise UserError(
                f"run_dir '{path}' already holds checkpoints up to {existing[-1].name}; "
                "continue with --resume auto, or choose another run_dir"
            )
        return None
    if resume == "auto":
        chosen = existing[-1] if existing else None
    else:
        chosen = find_checkpoint(resume)
        if existing and chosen.resolve() != existing[-1].resolve():
            raise UserError(
                f"run_dir '{path}' holds checkpoints up to {existing[-1].name}; to continue from '{chosen}' "
                "choose another run_dir"
            )
    if chosen and (step := read_state(chosen)["step"]) > config.train.steps:
        raise UserError(f"train.steps is {config.train.steps}, but checkpoint '{chosen}' is already at step {step}")
    return chosen


def write_run_files(config: Config, deepspeed_config: dict[str, Any], world_size: int) -> None:
    """Write down what is run; on the first process, once nothing can be refused any more."""
    path = Path(config.run_dir)
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    remove_partial_checkpoints(path / "checkpoints")
    with atomic_write(path / "config.yaml", "w") as file:
        yaml.safe_dump(config_to_dict(config), file, sort_keys=False)
    write_json(path / "deepspeed_config.json", deepspeed_config)
    write_json(path / "version.json", {**versions(), "command": sys.argv, "processes": world_size})


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
