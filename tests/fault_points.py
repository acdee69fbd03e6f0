"""Points of a training process at which it can be hurt, planted from outside: product code knows nothing of them.

`plant` wraps functions in the process that calls it. Each call of one of them reaches a point; the fault strikes when
its rank has reached its point the given number of times. Files of a checkpoint may be written on any thread.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

COMPUTATION = ("forward", "all-to-all", "backward", "optimizer step")
WRITING = ("weights' file", "average's file", "state.json", "list of files", "run's file")
RENAMING = ("checkpoint's rename", "latest")
POINTS = (*COMPUTATION, *WRITING, *RENAMING, "retention's deletion")
WHENS = ("before", "after")
FILES = (  # of a checkpoint: pattern of the name, point
    (r"\.pt\b", "weights' file"),
    (r"ema\.safetensors\b", "average's file"),
    (r"state\.json\b", "state.json"),
    (r"files_of_rank_\d+\.json\b", "list of files"),
)
RENAMES = (
    (r"step_\d+", "checkpoint's rename"),
    ("latest", "latest"),
    (r"\.removing_step_\d+", "retention's deletion"),
)
FILLER = "filler"  # what fills the disk that a run is on


@dataclass(frozen=True)
class Fault:
    """When ``rank`` reaches ``point`` for the ``count``-th time, just before or after it happens, ``action`` is done.

    action: a signal's name, sent to this rank or with ``to_all`` to all ranks; or "fill" for a file that takes all
    that is left of the disk; or, at "forward", "flip" for a bit of a weight in this rank's memory.
    kept: of a file being written, the part that has reached the disk by then; below 1 for a death alone.
    """

    point: str
    rank: int
    count: int
    when: str = "before"
    action: str = "SIGKILL"
    to_all: bool = False
    kept: float = 1.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def fault_from_json(text: str) -> Fault:
    return Fault(**json.loads(text))


def events_of(folder: Path, rank: int) -> Counter:
    """How often the rank of a finished run reached each point."""
    return Counter((folder / f"events.{rank}").read_text().splitlines())


def plant(folder: Path, run_dir: Path, fault: Fault | None) -> None:
    """Wrap what `POINTS` name, in a process whose rank is in the environment.

    Args:
        folder: where each rank leaves ``pid.RANK``, and ``events.RANK``, the points that it reached, a line each.
        run_dir: the run's; files elsewhere are no points.
    """
    import torch
    from deepspeed import DeepSpeedEngine

    from switchdit.models.switch_dit import SwitchDiTBlock

    rank = int(os.environ["RANK"])
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    events = os.open(folder / f"events.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    counts, lock = Counter(), threading.Lock()

    def strikes(point: str) -> bool:
        with lock:
            counts[point] += 1
            count = counts[point]
        os.write(events, f"{point}\n".encode())
        return fault is not None and (fault.point, fault.rank, fault.count) == (point, rank, count)

    def around(call: Callable, point_of: Callable[..., str | None], prepare: Callable = lambda *_: None) -> Callable:
        @functools.wraps(call)
        def wrapped(*args, **kwargs):
            point = point_of(*args, **kwargs)
            if point is None or not strikes(point):
                return call(*args, **kwargs)
            if fault.when == "before":
                prepare(*args)
                _act(fault, folder, run_dir)
                return call(*args, **kwargs)
            result = call(*args, **kwargs)
            _act(fault, folder, run_dir)
            return result

        return wrapped

    def flip_a_bit(owner, *_) -> None:
        if fault.action == "flip":
            owner.attn.qkv.weight.data.view(torch.int32)[3, 5] ^= 1 << 20

    owners = (SwitchDiTBlock, torch.distributed, DeepSpeedEngine, torch.optim.AdamW)
    names = ("forward", "all_to_all_single", "backward", "step")
    for owner, name, point in zip(owners, names, COMPUTATION, strict=True):
        setattr(owner, name, around(getattr(owner, name), lambda *_, point=point, **__: point, flip_a_bit))

    truncate = os.ftruncate
    os.fsync = around(
        os.fsync,
        lambda file: _written(file, run_dir),
        lambda file: truncate(file, int(os.fstat(file).st_size * fault.kept)),
    )
    os.replace = around(os.replace, lambda _, to, **__: _renamed(Path(to), run_dir / "checkpoints"))
    os.unlink = around(os.unlink, lambda path, *, dir_fd=None: _deleted(dir_fd, run_dir / "checkpoints"))


def _act(fault: Fault, folder: Path, run_dir: Path) -> None:
    if fault.action == "fill":
        _fill(run_dir / FILLER)
        return
    if fault.action == "flip":
        return  # done, where the weight is at hand
    others = [p for p in folder.glob("pid.*") if p.name != f"pid.{fault.rank}"] if fault.to_all else []
    for pid in [*(int(p.read_text()) for p in others), os.getpid()]:
        os.kill(pid, getattr(signal, fault.action))


def _fill(path: Path) -> None:
    """Take all the space that is left; a full disk is what is wanted."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 16, 1 << 12, 1):
        try:
            while os.write(file, bytes(size)):
                pass
        except OSError:
            continue
    os.close(file)


def _written(file: int, run_dir: Path) -> str | None:
    path = Path(os.readlink(f"/proc/self/fd/{file}"))
    if path.is_dir() or run_dir not in path.parents:
        return None
    if path.parent == run_dir:
        return "run's file"
    return next((point for pattern, point in FILES if re.search(pattern, path.name)), None)


def _renamed(to: Path, checkpoints: Path) -> str | None:
    if to.parent != checkpoints:
        return None
    return next((point for pattern, point in RENAMES if re.fullmatch(pattern, to.name)), None)


def _deleted(folder: int | None, checkpoints: Path) -> str | None:
    """Of a file in a folder that is being deleted with all that it holds."""
    if folder is None:
        return None
    inside = checkpoints in Path(os.readlink(f"/proc/self/fd/{folder}")).parents
    return "retention's deletion" if inside else None
