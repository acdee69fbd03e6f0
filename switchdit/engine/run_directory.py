"""A run's folder: what it holds, when it may be used, and what is written there before the first step.

<run_dir>/config.yaml  deepspeed_config.json  version.json  log.jsonl  checkpoints/  tensorboard/
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml
from deepspeed import comm as dist

import switchdit
from switchdit.config import Config, config_to_dict
from switchdit.engine.checkpoint_folder import checkpoint_folders, damage, find_checkpoint, read_state
from switchdit.engine.engine import agree, told_by_all
from switchdit.errors import FaultError, UserError, without_passwords
from switchdit.files import atomic_write, check_writable, write_json
from switchdit.progress import say


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to continue from; None for a fresh start.
        damaged: newer ones of the run that cannot be used, each with what is wrong with it.
    """

    checkpoint: Path | None = None
    damaged: tuple[tuple[Path, str], ...] = ()


def candidates(config: Config, resume: str | None) -> list[Path]:
    """Checkpoints to continue from, the first choice first; none for a fresh start. Nothing is written.

    Args:
        resume: None, ``"auto"`` (the run's own, the newest first, or a fresh start), or a checkpoint's path.

    Raises:
        UserError: if the run's folder holds checkpoints that would be mixed up, or a named checkpoint is not whole.
    """
    path = Path(config.run_dir)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"run_dir '{path}' is a file")
        check_writable(path, "run_dir")
        existing = checkpoint_folders(path / "checkpoints")
    except (OSError, ValueError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"run_dir '{path}' cannot be used: {getattr(problem, 'strerror', None) or problem}") from None
    if resume is None:
        if existing:
            raise UserError(
                f"run_dir '{path}' already holds checkpoints up to {existing[-1].name}; "
                "continue with --resume auto, or choose another run_dir"
            )
        return []
    if resume == "auto":
        return existing[::-1]
    chosen = find_checkpoint(resume)
    if existing and chosen.resolve() != existing[-1].resolve():
        raise UserError(
            f"run_dir '{path}' holds checkpoints up to {existing[-1].name}; to continue from '{chosen}' "
            "choose another run_dir"
        )
    return [chosen]


def choose_start(config: Config, found: list[Path], resume: str | None) -> Start:
    """The first of ``found`` whose files are what was written; each process looks at its share of them; collective.

    Raises:
        UserError: if none is left, or the one chosen lies beyond ``train.steps``.
    """
    damaged = []
    for path in found:
        share = partial(damage, path, dist.get_rank(), dist.get_world_size())
        if complaints := told_by_all(agree(share)):
            damaged.append((path, complaints[0]))
            continue
        if (step := read_state(path)["step"]) > config.train.steps:
            raise UserError(f"train.steps is {config.train.steps}, but checkpoint '{path}' is already at step {step}")
        return Start(path, tuple(damaged))
    if damaged:
        told = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
        where = f"checkpoint '{found[0]}' is" if resume != "auto" else f"all checkpoints of '{config.run_dir}' are"
        raise UserError(f"{where} damaged, and there is nothing to continue from: {told}")
    return Start()


def check_unchanged(config: Config, resume: str | None, found: list[Path]) -> None:
    """Raise `FaultError` if the run's checkpoints are others than those ``found`` before; on the first process."""
    if (now := candidates(config, resume)) != found:
        newest = now[0].name if now else "none"
        raise FaultError(
            f"an earlier start of the run still wrote into '{config.run_dir}' while this one was loading "
            f"{found[0].name if found else 'nothing'}: its newest checkpoint is {newest} now; start again"
        )


def put_aside(start: Start) -> None:
    """Rename damaged checkpoints of a run, so that their names are free again; on the first process."""
    for path, problem in start.damaged:
        aside = path.with_name(f"damaged_{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(path, aside)
        say(f"checkpoint {path.name} is damaged ({problem}): now {aside.name}, going back to {start.checkpoint.name}")


def write_run_files(config: Config, deepspeed_config: dict[str, Any], world_size: int) -> None:
    """Write down what is run; on the first process, once nothing can be refused any more."""
    path = Path(config.run_dir)
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    with atomic_write(path / "config.yaml", "w") as file:
        yaml.safe_dump(config_to_dict(config), file, sort_keys=False)
    write_json(path / "deepspeed_config.json", deepspeed_config)
    write_json(
        path / "version.json",
        {**versions(), "command": [without_passwords(word) for word in sys.argv], "processes": world_size},
    )


def versions() -> dict[str, str]:
    """Of the code and of what it runs on."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match", ""]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True, timeout=120).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "switchdit": switchdit.__version__,
        "git_revision": revision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
