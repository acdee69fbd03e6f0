"""Checkpoints are written beside training: what DeepSpeed wants to save is copied to host memory, and a thread of each
process writes it.

A process that has written its files leaves a list of them with their SHA-256 in the unfinished folder. The first
process waits for all these lists, writes ``state.json``, and only then gives the folder its name. No communication is
needed for that but the folder itself, so that nothing of it can be in training's way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from switchdit.errors import FaultError, UserError
from switchdit.files import DISK_FULL, atomic_write, sync_directory, write_json

REMOVING = ".removing_"
SYNC_EVERY = 1 << 26  # bytes, so that what counts as progress is on the disk, and the last fsync has little to wait for
POLL = 0.05  # seconds between looks for the other processes' lists

# All that DeepSpeed's files hold besides tensors, numbers and containers
SAFE_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]

Write = Callable[[IO[bytes]], None]


class SnapshotEngine(CheckpointEngine):
    """DeepSpeed's file access: saving copies to host memory, and loading unpickles tensors and `SAFE_CLASSES` alone.

    Attributes:
        pending: what was saved since the last `take`: path -> state with tensors on the CPU.
    """

    def __init__(self, config_params: Any = None):
        super().__init__(config_params)
        self.name = "SnapshotEngine"
        self.pending: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self.pending = {}

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self.pending[path] = to_host(state_dict)

    def take(self) -> dict[str, Any]:
        """The snapshot, by file name, which this engine forgets."""
        taken, self.pending = {Path(path).name: state for path, state in self.pending.items()}, {}
        return taken

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        return load_tensors(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def load_tensors(path: str | os.PathLike, map_location: Any = None, mmap: bool = False) -> dict[str, Any]:
    """A file of DeepSpeed's; nothing but tensors, plain values and `SAFE_CLASSES` is unpickled."""
    with torch.serialization.safe_globals(SAFE_CLASSES):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def to_host(value: Any) -> Any:
    """A copy of nested containers with every tensor copied to the CPU, without what else its storage holds."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, to_host(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(to_host(item) for item in value)
    return value


def host_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if type(value) in (list, tuple) else ()
    return sum(map(host_bytes, items))


def safetensors_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Write:
    """What writes float32 tensors on the CPU in the safetensors format, one by one and always in the same bytes.

    The library's own writer makes a second copy of all of them, and orders metadata at random.
    """
    header, start = {"__metadata__": metadata}, 0
    for name, value in tensors.items():
        assert value.dtype == torch.float32
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, start + value.nbytes]}
        start += value.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(head)) + head)
        for value in tensors.values():
            file.write(value.contiguous().numpy().reshape(-1).view("u1").data)

    return write


def tensor_file(state: dict[str, Any]) -> Write:
    """What writes ``state`` as DeepSpeed would."""

    def write(file: _HashingFile) -> None:
        try:
            torch.save(state, file)
        except RuntimeError:  # how torch reports whatever went wrong below it
            if file.problem:
                raise file.problem from None
            raise

    return write


class _HashingFile:
    """A file that knows its bytes' number and SHA-256, and the error of a failed write, which torch.save hides."""

    def __init__(self, file: IO[bytes], on_progress: Callable[[], None] = lambda: None):
        self.file, self.digest, self.size, self.problem = file, hashlib.sha256(), 0, None
        self.on_progress = on_progress

    def write(self, data: bytes) -> int:
        try:
            for start in range(0, len(data), SYNC_EVERY):
                self._write(memoryview(data)[start : start + SYNC_EVERY])
        except OSError as problem:
            self.problem = problem
            raise
        return len(data)

    def _write(self, data: memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        before, self.size = self.size, self.size + len(data)
        if self.size // SYNC_EVERY > before // SYNC_EVERY:
            self.file.flush()
            os.fdatasync(self.file.fileno())
        self.on_progress()

    def flush(self) -> None:
        self.file.flush()


class CheckpointWriter:
    """Writes this process's part of one checkpoint at a time, on a thread.

    Args:
        on_progress: called by whoever waits for this, now and then, as long as it gets on.

    Attributes:
        problem: why the last checkpoint could not be written, a `UserError` or `FaultError`; None while all is well.
    """

    def __init__(self, rank: int, world_size: int, on_progress: Callable[[], None] = lambda: None):
        self.rank, self.world_size, self.on_progress = rank, world_size, on_progress
        self.problem: UserError | FaultError | None = None
        self._progress = 0
        self._thread, self._written, self._given_up = None, threading.Event(), threading.Event()

    def start(self, partial: Path, files: dict[str, Write], finish: Callable[[dict[str, Any]], None]) -> None:
        """Begin to write ``files`` (name -> what writes it) into the folder ``partial``.

        ``finish`` is called by the first process with every file of all processes (name -> bytes and sha256).
        """
        self.problem = None
        self._written.clear()
        self._given_up.clear()
        self._thread = threading.Thread(
            target=self._run, args=(partial, files, finish), name="checkpoint writer", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait_until_written(self) -> UserError | FaultError | None:
        """Wait for this process's files. Returns what went wrong."""
        self._wait(lambda: self._written.wait(timeout=1.0))
        return self.problem

    def wait_until_finished(self) -> None:
        """Wait for the checkpoint to be whole; all processes must have written their files without a problem."""
        self._wait(lambda: self._thread.join(timeout=1.0) or not self._thread.is_alive())
        self._thread = None

    def give_up(self) -> None:
        """Stop waiting for processes that cannot write their part; the problem has been told."""
        self._given_up.set()
        self.wait_until_finished()
        self.problem = None

    def _run(self, partial: Path, files: dict[str, Write], finish: Callable[[dict[str, Any]], None]) -> None:
        try:
            done = {name: write_hashed(partial / name, write, self.made_progress) for name, write in files.items()}
            self._list(partial, done)
            self._written.set()
            if self.rank == 0 and (everything := self._gather(partial)) is not None:
                finish(everything)
        except Exception as problem:  # whatever it is, it must not end the thread unheard
            self.problem = _told(problem, partial)
        finally:
            self._written.set()

    def made_progress(self) -> None:
        """Something has been written or removed; called on the thread."""
        self._progress += 1

    def _wait(self, is_done: Callable[[], bool]) -> None:
        seen = self._progress
        while self._thread is not None and not is_done():
            if self._progress > seen:
                seen = self._progress
                self.on_progress()

    def _list(self, partial: Path, done: dict[str, Any]) -> None:
        """Leave the list of this process's files.

        The rename is the last that is done in the folder: as soon as the last list is there, the first process may
        give the folder its name.
        """
        name = _list_name(self.rank)
        write_json(partial / f"{name}.whole", done)
        os.replace(partial / f"{name}.whole", partial / name)

    def _gather(self, partial: Path) -> dict[str, Any] | None:
        names = {_list_name(rank) for rank in range(self.world_size)}
        while not names <= (there := set(os.listdir(partial))):
            if _list_name(self.rank) not in there:  # somebody deleted the folder, and another process made it again
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(partial))
            if self._given_up.wait(POLL):
                return None
        everything = {}
        for name in sorted(names):
            everything |= json.loads((partial / name).read_text(encoding="utf-8"))
        for name in names:
            (partial / name).unlink()
        return everything


def _list_name(rank: int) -> str:
    return f"files_of_rank_{rank:05d}.json"


def write_hashed(path: Path, write: Write, on_progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write a file atomically; returns its ``bytes`` and ``sha256``. ``on_progress`` is called after every write."""
    with atomic_write(path) as file:
        hashing = _HashingFile(file, on_progress)
        write(hashing)
    return {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}


def commit(partial: Path, final: Path) -> None:
    """Give a folder whose files are synced its name, and let ``latest`` beside it say so; durable, and in this order.

    ``latest`` never names what is not there, and a checkpoint that is there without it is found all the same.
    """
    sync_directory(partial)
    os.replace(partial, final)
    sync_directory(final.parent)
    with atomic_write(final.parent / "latest", "w") as file:
        file.write(final.name + "\n")


def remove_folder(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for one."""
    going = path.with_name(f"{REMOVING}{path.name}")
    os.replace(path, going)
    shutil.rmtree(going)


def lack_of_space(root: Path, needed: int) -> str | None:
    """What is wrong if the disk that holds ``root`` has not ``needed`` bytes left."""
    free = shutil.disk_usage(root).free
    if free >= needed:
        return None
    return (
        f"the next checkpoint needs {needed / 1e9:.3g} GB, but the disk that holds '{root}' has {free / 1e9:.3g} GB "
        "left; nothing was written and the checkpoints before it are whole. Free some, or set monitor.keep_last"
    )


def _told(problem: Exception, partial: Path) -> UserError | FaultError:
    """In one line: what the user has to put right, or a fault of the machine, after which a new start may help."""
    if isinstance(problem, UserError | FaultError):
        return problem
    if not isinstance(problem, OSError):
        told = " ".join(f"{type(problem).__name__}: {problem}".split())
        return FaultError(f"the checkpoint {partial} cannot be written: {told}")
    where = problem.filename or partial
    if problem.errno in DISK_FULL:
        return UserError(f"no space left on the disk that holds {where}; nothing half-written was kept")
    if problem.errno == errno.ENOENT:
        return UserError(f"{where} vanished while the checkpoint was written; is something else deleting files there?")
    told = f"the checkpoint {partial} cannot be written: {problem.strerror or problem} ({where})"
    return UserError(told) if problem.errno in (errno.EROFS, errno.EACCES) else FaultError(told)
