"""A checkpoint's folder: its name, what it must hold, and whether it still does.

`switchdit.engine.checkpoint` says what is in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from switchdit.engine.checkpoint_writer import REMOVING
from switchdit.errors import FaultError, UserError
from switchdit.files import atomic_write, inside, sha256_of

FORMAT_VERSION = 1
MODEL_METADATA = "switchdit_model"  # of safetensors files under our names: JSON, the arguments of `build_model`
PARTIAL = ".partial_"
EMA = "ema.safetensors"


def checkpoint_name(step: int) -> str:
    return f"step_{step:07d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def checkpoint_folders(root: str | os.PathLike) -> list[Path]:
    """Checkpoints under ``root``, oldest first, also those that something has damaged since they were written."""
    found = (p for p in Path(root).glob("step_*") if p.is_dir() and p.name[len("step_") :].isdecimal())
    return sorted(found, key=step_of)


def complete_checkpoints(root: str | os.PathLike) -> list[Path]:
    """Checkpoints under ``root`` that have their ``state.json``, oldest first."""
    return [path for path in checkpoint_folders(root) if (path / "state.json").is_file()]


def remove_partial_checkpoints(root: str | os.PathLike) -> None:
    """Delete what an interrupted save or removal left behind. Call on one rank, before training.

    A run that was thought dead, and whose folder this was, may still be writing there until it notices.
    """
    for pattern in (f"{PARTIAL}*", f"{REMOVING}*"):
        for left_over in Path(root).glob(pattern):
            shutil.rmtree(left_over, ignore_errors=True)
    for left_over in Path(root).glob(".*.partial"):  # of `latest`
        left_over.unlink(missing_ok=True)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint's folder from itself, from a run's folder or from its ``checkpoints`` folder (the newest).

    Raises:
        UserError: if there is no whole checkpoint.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    for root in (path / "checkpoints", path):
        if found := complete_checkpoints(root):
            return found[-1]
    raise UserError(f"'{path}' holds no complete checkpoint (a run's folder, or .../checkpoints/step_NNNNNNN)")


def damage(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None. Of several processes each looks at its share of them.

    Raises:
        UserError: of a version that this program does not read.
        FaultError: if a file is there and cannot be read now, for another reason than a bad disk.
    """
    name = "state.json"
    try:
        state = _checked_state(path)
        if path.name.startswith("step_") and path.name != checkpoint_name(state["step"]):
            return f"it is of step {state['step']}: somebody has renamed it"
        files = state.get("files", {})  # of an older version, without checksums: nothing to compare
        for name in sorted(files)[rank::world_size]:
            file = inside(path, name)
            if (size := file.stat().st_size) != files[name]["bytes"]:
                return f"{name} has {size:,} bytes instead of {files[name]['bytes']:,}"
            if sha256_of(file) != files[name]["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except OSError as problem:
        told = f"{name} cannot be read: {problem.strerror}"
        if problem.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
            return told
        raise FaultError(f"checkpoint '{path}': {told}") from None
    except OtherVersion as problem:
        raise UserError(f"checkpoint '{path}': {problem}") from None
    except ValueError as problem:
        return str(problem)
    return None


class OtherVersion(ValueError):
    """A file of another format than this program reads; nothing is wrong with it."""


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state.json`` with the SHA-256 of its own content as the last entry."""
    with atomic_write(folder / "state.json", "w") as file:
        json.dump({**state, "sha256": _sha256_of_state(state)}, file, indent=2)
        file.write("\n")


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: if it cannot be read, or is not what was written.
    """
    try:
        return _checked_state(path)
    except OSError as problem:
        raise UserError(f"checkpoint '{path}': state.json cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise UserError(f"checkpoint '{path}': {problem}") from None


def _checked_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"state.json cannot be read: {problem}") from None
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        kind = OtherVersion if isinstance(version, int) else ValueError
        raise kind(f"state.json is of format version {version}; this program reads {FORMAT_VERSION}")
    recorded = state.pop("sha256", None)
    if recorded is None and "files" not in state:  # an older version wrote neither
        return state
    if recorded != _sha256_of_state(state):
        raise ValueError("state.json is not what was written (its SHA-256 differs)")
    files = state.get("files")
    entries = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        raise ValueError("state.json has no table of files with bytes and sha256")
    return state


def read_ema(path: Path) -> dict[str, torch.Tensor]:
    """Averaged weights of a checkpoint, float32, experts under global ids."""
    recorded = read_state(path).get("files", {}).get(EMA)
    try:
        content = (path / EMA).read_bytes()
        if recorded and hashlib.sha256(content).hexdigest() != recorded["sha256"]:
            raise UserError(f"checkpoint '{path}': {EMA} is not what was written (its SHA-256 differs)")
        return load(content)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"checkpoint '{path}': {EMA} cannot be read: {problem}") from None


def _sha256_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
