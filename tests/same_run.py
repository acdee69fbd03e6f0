"""Whether two runs came to the same end, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_run import read_log

from switchdit.engine.checkpoint_folder import damage
from switchdit.engine.checkpoint_writer import load_tensors


def difference(ours: Path, theirs: Path, checkpoint: str) -> str | None:
    """The first thing in which two runs' folders differ in log and checkpoint; None where they are equal.

    Compared are all tensors and values of the checkpoint's files; of ``state.json`` all but paths, checksums, which
    must be right, and the version of the code, which somebody may edit meanwhile.
    """
    a, b = (folder / "checkpoints" / checkpoint for folder in (ours, theirs))
    for folder in (a, b):
        if not folder.is_dir():
            return f"no {folder}"
        if wrong := damage(folder):
            return f"{folder}: {wrong}"
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    if names[0] != names[1]:
        return f"files {sorted(set(names[0]) ^ set(names[1]))}"
    contents = [
        {path.name: _content(path) for path in sorted(folder.iterdir())} | {"log": read_log(run)}
        for folder, run in ((a, ours), (b, theirs))
    ]
    return _difference(*contents, "")


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        del content["sha256"], content["files"], content["config"]["run_dir"], content["config"]["data"]["latents"]
        content.pop("version", None)
        return content
    return load_file(path) if path.suffix == ".safetensors" else load_tensors(path)


def _difference(a: Any, b: Any, where: str) -> str | None:
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else where
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return where
        pairs = [(a[key], b[key], f"{where}/{key}") for key in a]
    elif isinstance(a, list | tuple):
        if type(a) is not type(b) or len(a) != len(b):
            return where
        pairs = [(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        known = isinstance(a, int | float | str | bool | None)
        return where if known and a != b else None
    return next((found for pair in pairs if (found := _difference(*pair))), None)
