"""The head of a .npy file, read strictly: what numpy writes, and nothing else. And such a file, written.

numpy's own reader evaluates the head as Python, which is slow for a million small files and answers damage with any of
a dozen exceptions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import IO

import numpy as np

LONGEST = 1 << 16  # bytes; numpy's own heads have 128
HEAD = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)"
    rb"\{'descr': '([<>|=]?[a-zA-Z]\d{0,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? ?\} *\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class NpyHeader:
    """Type and shape of an array in C order, and where in the file its values begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def file_size(self) -> int:
        """Bytes of a whole file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def parse_npy_header(start: bytes) -> NpyHeader:
    """The header at the ``start`` of a file (`LONGEST` bytes of it, or the whole file).

    Raises:
        ValueError: no .npy file, a damaged one, Fortran order, or values that are no plain numbers; Python objects,
            which would have to be unpickled, are among them.
    """
    match = HEAD.match(start)
    if not match:
        raise ValueError("it does not begin as a .npy file does, or holds no plain numbers")
    descr, fortran_order, shape = match.groups()
    version, length = start[6], match.end()
    size = 2 if version == 1 else 4
    if int.from_bytes(start[8 : 8 + size], "little") != length - 8 - size:
        raise ValueError("its head is not as long as it says")
    if b"O" in descr:
        raise ValueError("it holds pickled Python objects, which can run code and are never loaded")
    if fortran_order == b"True":
        raise ValueError("it lies in Fortran order; save np.ascontiguousarray(...) of it")
    try:
        dtype = np.dtype(descr.decode())
    except TypeError as problem:
        raise ValueError(f"its type {descr.decode()} is unknown") from problem
    return NpyHeader(dtype, tuple(int(side) for side in shape.split(b",") if side.strip()), length)


def write_npy(file: IO[bytes], array: np.ndarray) -> None:
    """The bytes of `numpy.save`, whose error on a full disk does not tell that it is full."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)
