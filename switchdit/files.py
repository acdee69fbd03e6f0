"""Files that are whole or absent: temporary name, fsync, rename. And their checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from switchdit.errors import UserError

if TYPE_CHECKING:
    import numpy as np

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def make_folder(path: str | os.PathLike) -> None:
    """A folder and those above it, where they are missing; `UserError` in one line if something is in the way."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        if problem.errno in DISK_FULL:
            raise
        raise UserError(f"folder '{path}' cannot be made: {problem.strerror}") from None


def inside(folder: str | os.PathLike, name: Any) -> Path:
    """The path of ``name``, which comes out of a file, below ``folder``.

    Symbolic links are followed: they are the work of whoever made the folder, as in the cache of the Hugging Face hub.

    Raises:
        UserError: if ``name`` is no relative path to something below the folder.
    """
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else []
    if not set(parts).isdisjoint({"", ".", ".."}) or not parts or any(sign in name for sign in "\0:"):
        raise UserError(f"{name!r} is refused: it is no name of a file inside '{folder}'")
    return Path(folder, name)


def check_writable(path: str | os.PathLike, option: str) -> None:
    """Raise `UserError` where the file or folder ``path`` that ``option`` names could not be made or written into."""
    path = Path(path)
    whole = path.absolute()
    nearest = whole if whole.is_dir() else next(parent for parent in whole.parents if os.path.exists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path} cannot be written: {nearest} is no folder that you may write to")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the name ``path`` only when the block ends without an error.

    The content is written to ``.<name>.<pid>.partial`` in the same folder, synced to disk and renamed. On any
    error the partial file is removed and whatever stood at ``path`` before is untouched.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except OSError as problem:
        if problem.errno in DISK_FULL and problem.filename is None:
            raise OSError(problem.errno, problem.strerror, str(path)) from problem
        raise
    finally:
        partial.unlink(missing_ok=True)


def allocate(path: str | os.PathLike, shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array in a file with all its blocks: a full disk is met here, not as a bus error later."""
    import numpy as np

    if not math.prod(shape):
        Path(path).touch()
        return np.empty(shape, np.uint8)
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
    except OSError as problem:
        Path(path).unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    return np.memmap(path, np.uint8, "r+", shape=shape)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add ``line`` and a line break to a file, or leave it as it was."""
    content = line.encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        start, problem = file.tell(), None
        try:
            if file.write(content) == len(content):
                return
        except OSError as error:
            problem = error
        file.truncate(start)
    number = problem.errno if problem else errno.ENOSPC  # a write that stops short: there is no more space
    raise OSError(number, os.strerror(number), str(path)) from problem


def sync_directory(path: str | os.PathLike) -> None:
    """Make renames inside the folder ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
