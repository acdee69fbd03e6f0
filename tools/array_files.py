"""Named arrays in .npz and .safetensors files, read block by block. No pickle is ever read.

Both readers offer the same: ``headers`` tells type and shape of every array without reading it, ``read`` returns one
array, ``blocks`` its rows a few at a time. What they raise for a damaged file is in ``DAMAGED``.
"""

from __future__ import annotations

import io
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import safetensors

# a row is an entry of an array's first axis

LONGEST_HEADER = 10_000  # characters of a .npy header: numpy's own limit
# zlib packs zeros a thousandfold, but no set of pictures that large even a hundredfold
SUSPICIOUS_BYTES, SUSPICIOUS_RATIO = 1 << 30, 200
SKIP = 1 << 24  # bytes read at a time on the way to a row

# zipfile and numpy report damaged files in all of these ways.
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    SyntaxError,
    MemoryError,
    safetensors.SafetensorError,
)

SAFETENSORS_TYPES = {
    **{"U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32"},
    **{"U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64"},
}


@dataclass(frozen=True)
class Header:
    """What a file says of an array. kind is numpy's letter (u, i, f, ...), or ? for a type numpy does not have."""

    shape: tuple[int, ...]
    dtype: str
    kind: str
    fault: str | None = None  # why the array cannot be read, as the end of a sentence


class NpzArrays:
    """Arrays of a .npz file, stored or compressed, ZIP64 or not."""

    def __init__(self, path: Path, names: tuple[str, ...]):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.members = sorted(name.removesuffix(".npy") for name in archive.namelist())
            self.headers = {
                name: _npy_header(archive, name, path.stat().st_size) for name in names if name in self.members
            }

    def read(self, name: str) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def blocks(self, name: str, size: int, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows ``start`` to ``stop``, ``size`` at a time, in C order.

        A zip file can only be read from the beginning of a member, so the rows before ``start`` are read too; and
        only who reads to the end learns whether the member's checksum is right.
        """
        header = self.headers[name]
        row = header.shape[1:]
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            _read_npy_head(file)
            _skip(file, start * int(np.prod(row, dtype=object)) * np.dtype(header.dtype).itemsize)
            for first in range(start, stop, size):
                yield _read_exactly(file, np.empty((min(size, stop - first), *row), header.dtype))
            if stop == header.shape[0] and file.read(1):
                raise zipfile.BadZipFile("bytes after the last row")


def _npy_header(archive: zipfile.ZipFile, name: str, file_bytes: int) -> Header:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{name} is compressed in a way that numpy does not write")
    with archive.open(member) as file:
        head = io.BytesIO(file.read(LONGEST_HEADER + 12))
    shape, fortran_order, dtype = _read_npy_head(head)
    length = member.file_size - head.tell()
    packed = min(member.compress_size, file_bytes)
    fault = None
    if dtype.hasobject:
        fault = f"has dtype {dtype}, which would have to be unpickled"
    elif dtype.names:
        fault = f"has dtype {dtype}"
    elif fortran_order and len(shape) > 2:
        fault = "lies in Fortran order and cannot be read in blocks; save np.ascontiguousarray(...) of it"
    elif any(side < 0 for side in shape) or length != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        fault = f"is damaged: shape {shape} and dtype {dtype} do not make its {length} bytes"
    elif length > SUSPICIOUS_BYTES and length > SUSPICIOUS_RATIO * packed:
        fault = f"is damaged: its {packed} bytes would unpack to {length}"
    return Header(shape, str(dtype), dtype.kind, fault)


def _read_npy_head(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file, max_header_size=LONGEST_HEADER)
    return np.lib.format.read_array_header_2_0(file, max_header_size=LONGEST_HEADER)


def _skip(file: IO[bytes], length: int) -> None:
    while length:
        read = len(file.read(min(length, SKIP)))
        if not read:
            raise EOFError(f"{length} bytes are missing at its end")
        length -= read


def _read_exactly(file: IO[bytes], array: np.ndarray) -> np.ndarray:
    """Fill ``array`` (C order) from the file and return it."""
    missing = memoryview(array).cast("B")
    while missing:
        length = file.readinto(missing)
        if not length:
            raise EOFError(f"{len(missing)} bytes are missing at its end")
        missing = missing[length:]
    return array


class SafetensorsArrays:
    """Arrays of a .safetensors file, mapped into memory; the library checks the header against the file's length."""

    def __init__(self, path: Path, names: tuple[str, ...]):
        self.path = path
        with safetensors.safe_open(path, framework="np") as file:
            self.members = sorted(file.keys())
            every = {name: _safetensors_header(file.get_slice(name)) for name in self.members}
        images = [name for name, header in every.items() if header.dtype == "uint8" and len(header.shape) == 4]
        self.names = {name: name for name in names if name in every}
        if "arr_0" not in every and len(images) == 1:  # a file of images under a name of its own
            self.names["arr_0"] = images[0]
        self.headers = {name: every[stored] for name, stored in self.names.items()}

    def read(self, name: str) -> np.ndarray:
        with safetensors.safe_open(self.path, framework="np") as file:
            return file.get_tensor(self.names[name])

    def blocks(self, name: str, size: int, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows ``start`` to ``stop``, ``size`` at a time."""
        with safetensors.safe_open(self.path, framework="np") as file:
            rows = file.get_slice(self.names[name])
            for first in range(start, stop, size):
                yield rows[first : min(first + size, stop)]


def _safetensors_header(array) -> Header:
    name = SAFETENSORS_TYPES.get(array.get_dtype())
    return Header(tuple(array.get_shape()), name or array.get_dtype(), np.dtype(name).kind if name else "?")
