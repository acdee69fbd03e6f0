"""Checkpoints that are whole or invisible, and from which a run continues, on however many processes.

    <run_dir>/checkpoints/
      step_0000700/            appears by a rename when every file in it is written and synced
        state.json             step, model, topology, what the run was, every file's size and SHA-256, its own SHA-256
        ema.safetensors        averaged weights, float32, experts under global ids: what sampling reads
        *.pt                   DeepSpeed's own files: weights, experts per rank, optimizer partitions
      latest                   name of the newest

Nothing random is stored: data order, noise and the rest derive from (seed, step). With the topology it was saved at, a
run goes on to the last bit through DeepSpeed's own loading; with another, through resharding.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from safetensors import SafetensorError, safe_open

from switchdit.engine.checkpoint_folder import (
    EMA,
    FORMAT_VERSION,
    MODEL_METADATA,
    PARTIAL,
    checkpoint_name,
    complete_checkpoints,
    read_state,
    remove_partial_checkpoints,
    step_of,
    write_state,
)
from switchdit.engine.checkpoint_writer import (
    CheckpointWriter,
    commit,
    host_bytes,
    lack_of_space,
    remove_folder,
    safetensors_file,
    tensor_file,
)
from switchdit.engine.ema import Ema
from switchdit.engine.engine import raise_together
from switchdit.engine.ownership import Ownership
from switchdit.engine.resharding import (
    check_optimizer,
    layout_digest,
    load_resharded,
    optimizer_identity,
    optimizer_names,
)
from switchdit.errors import FaultError, UserError
from switchdit.files import make_folder
from switchdit.progress import say

DOCUMENTATION = 1_000_000  # bytes that state.json and the like may take besides the tensors


class Checkpoints:
    """The checkpoints of a run, written beside training.

    Args:
        root: ``<run_dir>/checkpoints``.
        keep_last: how many of the newest to keep, 0 for all; keep_every: those of every n-th step are kept besides.
        owner: of the run's folder, asked before a checkpoint gets its name.
        on_progress: called while one waits for a checkpoint, as long as it is being written.
    """

    def __init__(
        self,
        root: Path,
        engine: DeepSpeedEngine,
        ema: Ema,
        keep_last: int = 0,
        keep_every: int = 0,
        owner: Ownership | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ):
        self.root, self.engine, self.ema = root, engine, ema
        self.keep_last, self.keep_every, self.owner = keep_last, keep_every, owner
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.writer = CheckpointWriter(self.rank, self.world_size, on_progress)

    def save(self, step: int, about: dict[str, Any], extra: dict[str, Any]) -> None:
        """Copy the state after ``step`` optimizer steps to host memory and begin to write it; collective.

        Waits for the one before, where that is still being written.

        Args:
            about: what the run is, e.g. model name and fields; it must be the same on resume.
            extra: what `load_checkpoint` gives back (``monitor``, ``objective``), and ``config``, from which sampling
                takes its settings. JSON.

        Raises:
            UserError: on all processes, if the one before could not be written or there is no space for this one.
        """
        self.finish()
        token = f"{self.owner.token}_" if self.owner else ""
        final, partial = self.root / checkpoint_name(step), self.root / f"{PARTIAL}{token}{checkpoint_name(step)}"
        self.engine.save_checkpoint(str(self.root), tag=partial.name, save_latest=False)
        states = self.engine.checkpoint_engine.take()
        averaged = self.ema.state_dict()
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "topology": topology(self.engine),
            "optimizer": optimizer_identity(self.engine),
            "optimizer_names": optimizer_names(self.engine),
            **about,
            **extra,
        }
        text = 2 * len(json.dumps(state)) if self.rank == 0 else 0  # indented
        self._check_space(host_bytes(states) + host_bytes(averaged) + text)
        files = {name: tensor_file(state) for name, state in states.items()}
        if self.rank == 0:
            files[EMA] = safetensors_file(averaged, {"format": "pt", MODEL_METADATA: json.dumps(about["model"])})
            make_folder(partial)
        dist.barrier()

        def finish(written: dict[str, Any]) -> None:
            write_state(partial, {**state, "files": written})
            if self.owner:
                self.owner.check()
            commit(partial, final)
            self._retain()

        self.writer.start(partial, files, finish)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole; collective.

        Raises:
            UserError, FaultError: on all processes, if one of them could not write its part; nothing of it is left.
        """
        try:
            raise_together(self.writer.wait_until_written())
            self.writer.wait_until_finished()
            raise_together(self.writer.problem)  # of the first process, which gave it its name
        except (UserError, FaultError):
            self.writer.give_up()
            dist.barrier()
            self._remove_partial()
            raise

    def _check_space(self, mine: int) -> None:
        needed = torch.tensor(mine, dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(needed)
        lack = lack_of_space(self.root, int(needed) + DOCUMENTATION) if self.rank == 0 else None
        try:
            raise_together(UserError(lack) if lack else None)
        except UserError:
            self._remove_partial()
            raise

    def _remove_partial(self) -> None:
        """On one process, unless the folder is another run's by now, or cannot be written: why is told already."""
        with contextlib.suppress(UserError, OSError):
            if self.rank == 0:
                if self.owner:
                    self.owner.check()
                remove_partial_checkpoints(self.root)

    def _retain(self) -> None:
        existing = complete_checkpoints(self.root)
        for path in existing[: -self.keep_last] if self.keep_last else []:
            if not self.keep_every or step_of(path) % self.keep_every:
                try:
                    remove_folder(path)
                    self.writer.made_progress()
                except OSError as problem:  # such as a file that somebody has open on a network's disk
                    say(f"checkpoint {path.name}, no longer to be kept, cannot be removed: {problem.strerror}")


def load_checkpoint(path: Path, engine: DeepSpeedEngine, ema: Ema, about: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Continue from ``path``; collective. Returns the number of steps done and what ``state.json`` holds.

    Raises:
        UserError: if the checkpoint is of another model, run or optimizer.
    """
    state = read_state(path)
    for key, value in about.items():
        if key in state and state[key] != value:  # what an older version did not write cannot be compared
            raise UserError(f"checkpoint '{path}' is of another {_difference(key, state[key], value)}")
    check_optimizer(path, state, engine)
    here, identity = topology(engine), optimizer_identity(engine)
    as_saved = {"layout": None, **state["topology"]} == here and state.get("optimizer", identity) == identity
    if as_saved:
        engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=True)
    else:
        load_resharded(path, state, engine)
    try:
        with safe_open(path / EMA, framework="pt") as file:
            ema.load(file.get_tensor)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"checkpoint '{path}': {EMA} cannot be read: {problem}") from None
    return state["step"], state


def topology(engine: DeepSpeedEngine) -> dict[str, Any]:
    """How a run is spread: what DeepSpeed's files depend on; collective."""
    return {
        "world_size": dist.get_world_size(),
        "ep_size": getattr(engine.module, "ep_size", 1),
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp32",
        "layout": layout_digest(engine),
    }


def _difference(key: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
        theirs, ours = ({k: d.get(k) for k in differing} for d in (theirs, ours))
    return f"{key}: it has {theirs}, this run {ours}"
