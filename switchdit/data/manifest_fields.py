"""What sidecars and manifests of latent shards must hold: files that people edit, and that may come from anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

SHARD_FILE = re.compile(r"shard_\d{5,}\.npy")
LABELS_FILE = re.compile(r"labels_\d{5,}\.npy")
NAMES_FILE = re.compile(r"names_\d{5,}\.json")
STORED = {"moments": 2, "sample": 1}  # numbers kept for each latent value: K


def fault_in(content: dict[str, Any], fields: dict[str, Callable[[Any], bool]]) -> str | None:
    """The first field that is missing or not valid, or None."""
    return next(
        (f"'{key}' is missing or not valid" for key, valid in fields.items() if not valid(content.get(key))), None
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _described(name: re.Pattern) -> Callable[[Any], bool]:
    """Of a file's entry: any other name could point outside the folder."""
    return lambda v: isinstance(v, dict) and fault_in(v, {"file": _named(name), "sha256": _text}) is None


def _entries(fields: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and all(isinstance(e, dict) and fault_in(e, fields) is None for e in v)


def _named(pattern: re.Pattern) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


SHARD_FIELDS = {"file": _named(SHARD_FILE), "num": _count, "bytes": _count, "sha256": _text}
SIDECAR_FIELDS = {**SHARD_FIELDS, "skipped": _texts}
MANIFEST_FIELDS = {
    "num_images": _count,
    "num_classes": _count,
    "class_names": _texts,
    "image_size": _count,
    "latent_shape": lambda v: isinstance(v, list) and len(v) == 3 and all(map(_count, v)),
    "dtype": lambda v: v == "float16",
    "flip": lambda v: isinstance(v, bool),
    "stored": lambda v: _text(v) and v in STORED,
    "scale_factor": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < float("inf"),
    "vae": lambda v: isinstance(v, dict) and _text(v.get("name")) and _text(v.get("sha256")),
    "labels": _described(LABELS_FILE),
    "names": _described(NAMES_FILE),
    "sources": _entries(
        {"images": _text, "num_files": _count, "first_shard": _count, "shard_size": lambda v: _count(v) and v > 0}
    ),
    "shards": _entries(SHARD_FIELDS),
    "skipped": _texts,
}
