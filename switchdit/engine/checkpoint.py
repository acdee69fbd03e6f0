"""Checkpoints that are whole or invisible, and from which a run continues to the last bit.

    <run_dir>/checkpoints/
      step_0000700/            appears by a rename when every file in it is written and synced
        state.json             step, model, topology, what the run was
        ema.safetensors        averaged weights, float32, experts under global ids: what sampling reads
        *.pt                   DeepSpeed's own files: weights, experts per rank, optimizer partitions
      latest                   name of the newest

Nothing random is stored: data order, noise and the rest derive from (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from switchdit.engine.ema import Ema
from switchdit.errors import UserError
from switchdit.files import atomic_write, sync_directory, write_json

FORMAT_VERSION = 1
MODEL_METADATA = "switchdit_model"  # of safetensors files under our names: JSON, the arguments of `build_model`
PARTIAL = ".partial_"

# All that DeepSpeed's files hold besides tensors, numbers and containers
SAFE_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


class TensorsOnlyCheckpointEngine(CheckpointEngine):
    """DeepSpeed's file access, with unpickling limited to tensors and `SAFE_CLASSES`, and files synced to disk."""

    def __init__(self, config_params: Any = None):
        super().__init__(config_params)
        self.name = "TensorsOnlyCheckpointEngine"

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        with atomic_write(path) as file:
            remembering = _RememberingFile(file)
            try:
                torch.save(state_dict, remembering)
            except RuntimeError:  # how torch reports whatever went wrong below it
                if remembering.problem:
                    raise remembering.problem from None
                raise

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


class _RememberingFile:
    """A file that keeps the error of a failed write, such as a full disk, which torch.save hides."""

    def __init__(self, file: IO[bytes]):
        self.file, self.problem = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as problem:
            self.problem = problem
            raise

    def flush(self) -> None:
        self.file.flush()


def checkpoint_name(step: int) -> str:
    return f"step_{step:07d}"


def complete_checkpoints(root: str | os.PathLike) -> list[Path]:
    """Whole checkpoints under ``root``, oldest first."""
    return sorted(p.parent for p in Path(root).glob("step_*/state.json"))


def remove_partial_checkpoints(root: str | os.PathLike) -> None:
    """Delete what an interrupted save left behind. Call on one rank, before training."""
    for left_over in Path(root).glob(f"{PARTIAL}*"):
        shutil.rmtree(left_over)


def save_checkpoint(
    root: str | os.PathLike,
    engine: DeepSpeedEngine,
    ema: Ema,
    step: int,
    about: dict[str, Any],
    extra: dict[str, Any],
) -> Path:
    """Write the state after ``step`` optimizer steps; collective.

    Args:
        about: what the run is, e.g. model name and fields; it must be the same on resume.
        extra: what `load_checkpoint` gives back (``monitor``, ``objective``), and ``config``, from which sampling takes
            its settings. JSON.

    Returns:
        The checkpoint's folder.
    """
    root = Path(root)
    final, partial = root / checkpoint_name(step), root / f"{PARTIAL}{checkpoint_name(step)}"
    first = dist.get_rank() == 0
    try:
        engine.save_checkpoint(str(root), tag=partial.name, save_latest=False)
        averaged = ema.state_dict()
        if first:
            with atomic_write(partial / "ema.safetensors") as file:
                file.write(save(averaged, {"format": "pt", MODEL_METADATA: json.dumps(about["model"])}))
            state = {"format_version": FORMAT_VERSION, "step": step, "topology": _topology(engine), **about}
            write_json(partial / "state.json", {**state, **extra})
        dist.barrier()
    except OSError:
        time.sleep(1)  # the other processes come to a barrier, where they wait for this one
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        sync_directory(partial)
        os.replace(partial, final)
        sync_directory(root)
        with atomic_write(root / "latest", "w") as file:
            file.write(final.name + "\n")
    dist.barrier()
    return final


def load_checkpoint(path: Path, engine: DeepSpeedEngine, ema: Ema, about: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Continue from ``path``; collective. Returns the number of steps done and what ``state.json`` holds.

    Raises:
        UserError: if the checkpoint is of another model, or of another topology (number of processes, ep_size, ZeRO
            stage, precision), which DeepSpeed's partitions cannot serve.
    """
    state = read_state(path)
    for key, value in about.items():
        if key in state and state[key] != value:  # what an older version did not write cannot be compared
            raise UserError(f"checkpoint '{path}' is of another {_difference(key, state[key], value)}")
    if state["topology"] != _topology(engine):
        raise UserError(
            f"checkpoint '{path}' is of another {_difference('topology', state['topology'], _topology(engine))}"
        )
    engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=True)
    ema.load_state_dict(read_ema(path))
    return state["step"], state


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


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"checkpoint '{path}' cannot be read: {problem}") from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint '{path}' has another format than version {FORMAT_VERSION}, which this program reads"
        )
    return state


def read_ema(path: Path) -> dict[str, torch.Tensor]:
    """Averaged weights of a checkpoint, float32, experts under global ids."""
    try:
        return load_file(path / "ema.safetensors")
    except (OSError, SafetensorError) as problem:
        raise UserError(f"checkpoint '{path}': ema.safetensors cannot be read: {problem}") from None


def _topology(engine: DeepSpeedEngine) -> dict[str, Any]:
    return {
        "world_size": dist.get_world_size(),
        "ep_size": getattr(engine.module, "ep_size", 1),
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp32",
    }


def _difference(key: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
        theirs, ours = ({k: d.get(k) for k in differing} for d in (theirs, ours))
    return f"{key}: it has {theirs}, this run {ours}"
