"""Archives of ``torch.export.save`` (.pt2), read without running anything that is in them.

The archive is a zip: ``models/<name>.json`` is the program; ``data/weights`` and ``data/constants`` hold a table in
JSON and the raw bytes of the tensors. Nothing of it is a pickle but the example inputs, which are not opened, and
objects that are no plain tensors, which are refused. Entries are stored, not compressed, and together no longer than
the file, so no file makes this program hold more than twice what it is long itself; nothing is written to disk.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchdit.errors import UserError

SCHEMA = 8  # major version of the program's JSON: another one is another language
EXPORT_ADVICE = "export the network with torch.export and write it with torch.export.save"
LARGEST_TENSOR = 2**40  # elements: strides of 0 let a few bytes stand for any number
MOST_DIMENSIONS = 16
STRIDED = 7  # of torch._export.serde.schema.Layout

# numbers of torch._export.serde.schema.ScalarType; complex, quantised and 8-bit floating numbers are left out
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


@dataclass(frozen=True)
class Pt2Archive:
    """program: the JSON of ``models/<name>.json``. tensors: parameters, buffers and constants, by their full names."""

    program: dict[str, Any]
    tensors: dict[str, Tensor]


def read_archive(path: Path) -> Pt2Archive:
    """Read a .pt2 file. Raises `UserError` for another kind of archive, any of `inert_pickle.DAMAGE` for damage."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise UserError("claims to hold more bytes than the file has")
        prefix, model = find_model(names)
        program = json.loads(read_entry(archive, f"{prefix}models/{model}.json"))
        version = program["schema_version"]["major"]
        if version != SCHEMA:
            raise UserError(f"has schema version {version}; this program reads version {SCHEMA}")
        if f"{prefix}byteorder" in names and read_entry(archive, f"{prefix}byteorder") != b"little":
            raise UserError("was written on a big-endian machine, which is not supported")
        tensors = {}
        for folder in ("weights", "constants"):
            table = f"{prefix}data/{folder}/{model}_{folder}_config.json"
            if table not in names:
                raise UserError(
                    f"was saved by an older PyTorch, with pickled {folder}; save it again with 2.10 or newer"
                )
            tensors |= read_tensors(
                archive, f"{prefix}data/{folder}/", json.loads(read_entry(archive, table))["config"]
            )
    return Pt2Archive(program, tensors)


def find_model(names: list[str]) -> tuple[str, str]:
    """The archive's folder, such as ``net/``, and the name of the one program in it; `UserError` if there is none."""
    models = [match for name in names if (match := re.fullmatch(r"([^/]+/)models/([^/]+)\.json", name))]
    if len(models) == 1:
        return models[0][1], models[0][2]
    last_parts = {name.rsplit("/", 1)[-1] for name in names}
    if models:
        found = f"holds {len(models)} programs ({', '.join(match[2] for match in models)}); expected one"
    elif "serialized_exported_program.json" in last_parts:
        raise UserError("was saved by an older PyTorch; save it again with 2.10 or newer")
    elif "constants.pkl" in last_parts:
        found = "is a TorchScript archive, which can bring code of its own"
    elif "data.pkl" in last_parts:
        found = "is a pickle of torch.save; pickles can run code when they are opened"
    else:
        found = "is a zip archive without an exported program (models/*.json)"
    raise UserError(f"{found}; {EXPORT_ADVICE}")


def read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"holds '{name}' compressed; torch.export.save does not compress")
    content = archive.read(entry)
    if len(content) != entry.file_size:
        raise UserError(f"is truncated: '{name}' is shorter than it says")
    return content


def read_tensors(archive: zipfile.ZipFile, folder: str, table: dict[str, dict]) -> dict[str, Tensor]:
    """The tensors of a table ``{name: payload}``. Names that share bytes share memory, as they did when saved."""
    storages: dict[tuple[str, torch.dtype], Tensor] = {}
    tensors = {}
    for name, payload in table.items():
        meta = payload["tensor_meta"]
        if payload["use_pickle"] is not False or meta is None:
            raise UserError(
                f"holds '{name}' as a pickle, which can run code when it is opened; only plain tensors are read"
            )
        if meta["dtype"] not in DTYPES or meta["layout"] != STRIDED:
            raise UserError(f"holds '{name}' as a tensor of an unsupported type or layout")
        key = (payload["path_name"], DTYPES[meta["dtype"]])
        if key not in storages:
            storages[key] = flat_tensor(bytearray(read_entry(archive, folder + key[0])), key[1])
        tensors[name] = strided(storages[key], meta, name)
    return tensors


def flat_tensor(content: bytearray, dtype: torch.dtype) -> Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:  # kernels count on a bool to be 0 or 1: indexing with another writes out of bounds
        return torch.frombuffer(content, dtype=torch.uint8) != 0
    return torch.frombuffer(content, dtype=dtype)


def strided(flat: Tensor, meta: dict[str, Any], name: str) -> Tensor:
    """View ``flat`` with the sizes, strides and offset of ``meta``; `UserError` for any element outside of it."""
    sizes, strides = ([number["as_int"] for number in meta[field]] for field in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    numbers = [*sizes, *strides, offset]
    valid = all(type(n) is int and 0 <= n < LARGEST_TENSOR for n in numbers) and len(sizes) == len(strides)
    if not valid or len(sizes) > MOST_DIMENSIONS or math.prod(sizes) >= LARGEST_TENSOR:
        raise UserError(f"gives '{name}' impossible sizes {sizes}, strides {strides} or offset {offset}")
    if 0 in sizes:
        return flat.new_empty(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if last >= flat.numel():
        raise UserError(f"holds {flat.numel()} numbers of '{name}'; its sizes and strides need {last + 1}")
    return flat.as_strided(sizes, strides, offset)
