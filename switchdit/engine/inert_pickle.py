"""Files of ``torch.save``, read without running anything that is in them.

A pickle is a program: its GLOBAL opcodes fetch functions by name and its REDUCE opcodes call them. The unpickler here
imports nothing. A name becomes one of `CONSTRUCTORS`, which take note of their arguments and do no more; or `Inert`,
if what it names is data or of no standard module; or the file is refused. Tensors come out as `TensorRecord`, and
bytes are read for those alone that the caller chooses: the state of an optimizer costs nothing.
"""

from __future__ import annotations

import functools
import lzma
import math
import pickle
import struct
import sys
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from switchdit.errors import UserError

ZIP_SIGNATURE = b"PK\x03\x04"
LEGACY_SIGNATURE = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version of the format before torch 1.6

# what reading hostile or damaged bytes can end in
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


# Every class that a pickle can reach has a __setstate__: BUILD would otherwise set attributes as it likes, on the class
# as well as on what is made of it.
class Inert:
    """Stands for an object that no weights need: takes everything, keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setitem__(self, key, value):
        pass

    def _swallow(self, value):
        pass

    __setstate__ = append = extend = add = _swallow


class StateDict(dict):
    """An OrderedDict without attributes; versions of modules (``_metadata``) are let go."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class StorageRecord(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class TensorRecord(NamedTuple):
    """A tensor of the file: a strided view of a storage. Takes the arguments of ``torch._utils._rebuild_tensor_v2``."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    hooks: Any = None
    metadata: Any = None

    def __setstate__(self, state):
        pass


class _Parameter:
    def __new__(cls, data, requires_grad=True, hooks=None, state=None):
        return data

    def __setstate__(self, state):
        pass


CONSTRUCTORS: dict[str, Any] = {
    "collections.OrderedDict": StateDict,
    "torch._utils._rebuild_tensor": TensorRecord,
    "torch._utils._rebuild_tensor_v2": TensorRecord,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# what of the standard library is data: it becomes `Inert`, and the rest is refused
DATA_MODULES = {"argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "typing", "uuid"}
DATA_TYPES = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, range, set, slice, str, tuple)
DATA_NAMES = {"_codecs.encode", "copyreg._reconstructor", "types.SimpleNamespace"} | {
    f"builtins.{data_type.__name__}" for data_type in DATA_TYPES
}


class InertUnpickler(pickle.Unpickler):
    """Args: file: the bytes; source: what refusals call it.

    Attributes:
        storages: all that the pickle has named, by key.
    """

    def __init__(self, file: IO[bytes], source: Path):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.source = source
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str) -> Any:
        # protocols up to 2 use the names of Python 2
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name, package = f"{module}.{name}", module.split(".")[0]
        if full_name in CONSTRUCTORS:
            return CONSTRUCTORS[full_name]
        is_data = full_name in DATA_NAMES or (package in DATA_MODULES and "." not in name)
        if package in sys.stdlib_module_names and not is_data:
            raise UserError(f"checkpoint '{self.source}' is refused: its pickle asks for {full_name!r}, a program")
        return Inert

    def persistent_load(self, saved_id: Any) -> StorageRecord:
        kind, dtype, key, _device, numel, *view = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype) or view not in ([], [None]):
            raise pickle.UnpicklingError("unknown storage")
        if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("malformed storage")
        return self.storages.setdefault(key, StorageRecord(key, dtype, numel))


def read_tensors(path: Path, choose: Callable[[Any], dict[str, TensorRecord]]) -> dict[str, Tensor]:
    """The chosen tensors of a ``torch.save`` file, on the CPU, contiguous, each with memory of its own.

    Args:
        path: of the zip format or of the one before torch 1.6.
        choose: picks what to read from the file's content, in which tensors are `TensorRecord`, and objects `Inert`.

    Raises:
        UserError: unreadable, truncated or damaged file; or one whose pickle asks for a function, by its name.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE
            file.seek(0)
            return (_read_zip if is_zip else _read_legacy)(file, path, choose)
    except UserError:
        raise
    except OSError as problem:
        raise UserError(f"checkpoint '{path}' cannot be read: {problem.strerror}") from None
    except DAMAGE:
        raise UserError(f"checkpoint '{path}' is truncated, damaged or no file of torch.save") from None


def _read_zip(file: IO[bytes], path: Path, choose: Callable) -> dict[str, Tensor]:
    """``<root>/data.pkl`` and one member ``<root>/data/<key>`` for each storage."""
    with zipfile.ZipFile(file) as archive:
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if not roots:
            raise zipfile.BadZipFile("no data.pkl")
        root = roots[0]
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"checkpoint '{path}' was written on a big-endian machine, which is not supported")
        with archive.open(f"{root}data.pkl") as data:
            content = InertUnpickler(data, path).load()
        return _materialise(choose(content), lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: IO[bytes], path: Path, choose: Callable) -> dict[str, Tensor]:
    """Pickles of signature, machine, content and storage keys; then each storage as its length and its bytes."""
    signature = tuple(InertUnpickler(file, path).load() for _ in LEGACY_SIGNATURE)
    if signature != LEGACY_SIGNATURE:
        raise pickle.UnpicklingError("another signature")
    if InertUnpickler(file, path).load()["little_endian"] is not True:
        raise UserError(f"checkpoint '{path}' was written on a big-endian machine, which is not supported")
    unpickler = InertUnpickler(file, path)
    content = unpickler.load()
    starts = {}
    for key in InertUnpickler(file, path).load():
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storage.numel:
            raise pickle.UnpicklingError("a storage of another length")
        starts[key] = file.tell()
        file.seek(numel * storage.dtype.itemsize, 1)

    def read(storage: StorageRecord) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return _materialise(choose(content), read)


def _materialise(records: dict[str, TensorRecord], read: Callable[[StorageRecord], bytes]) -> dict[str, Tensor]:
    @functools.lru_cache(maxsize=1)  # parameters may be views of one long storage
    def flat(storage: StorageRecord) -> Tensor:
        content = bytearray(read(storage))
        if len(content) != storage.numel * storage.dtype.itemsize:
            raise EOFError
        return torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)

    out = {}
    for name, (storage, offset, size, stride, *_) in records.items():
        # as_strided checks the bounds; a stride of 0 would let a few bytes claim any amount of memory
        if math.prod(size) > storage.numel:
            raise pickle.UnpicklingError("a tensor larger than its storage")
        out[name] = flat(storage).as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
    return out
