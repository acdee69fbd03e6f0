"""Weights under the names of the authors' own code."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from switchdit.engine.global_state import EXPERTS, load_global_state_dict
from switchdit.errors import UserError
from switchdit.models.switch_dit import SwitchDiT

# tables that the authors' models keep as buffers and ours computes
DERIVED = {"full_time", "prior._unit_mapping"}


def load_reference_checkpoint(
    model: nn.Module, path_or_state_dict: str | os.PathLike | dict[str, Tensor], which: str = "ema"
) -> None:
    """Load official Switch-DiT (or DiT) weights into a model from `build_model`, whatever its ``ep_size``.

    Args:
        path_or_state_dict: tensors under the authors' names; or a ``.safetensors`` or ``.pt`` file of them, or a
            ``.pt`` file that holds such a dict under ``which``. Nothing but tensors and plain containers is ever
            unpickled.
        which: ``"ema"`` or ``"model"``: the entry taken from a training checkpoint.

    Raises:
        UserError: unreadable file, or entries that are missing, extra or misshapen, by name.
    """
    if isinstance(path_or_state_dict, dict):
        source, weights = "the state dict", path_or_state_dict
    else:
        source, weights = str(path_or_state_dict), _read(Path(path_or_state_dict), which)
    if isinstance(model, SwitchDiT):
        weights = switch_dit_names(weights)
    load_global_state_dict(model, weights, source)


def switch_dit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of Switch-DiT to ours, with one entry per expert."""
    out = {}
    for name, value in weights.items():
        if name in DERIVED:
            continue
        if match := re.fullmatch(r"routers\.(\d+)\.f_gate\.1\.(weight|bias)", name):
            out[f"blocks.{match[1]}.moe.deepspeed_moe.gate.wg.{match[2]}"] = value
        elif match := re.fullmatch(r"routers\.(\d+)\.experts\.(w|b)", name):
            field = {"w": "weight", "b": "bias"}[match[2]]
            for j, expert in enumerate(value):  # (M, D, D) applied from the right, or (M, D)
                out[f"blocks.{match[1]}.moe.{EXPERTS}{j}.{field}"] = expert
        else:
            out[name] = value
    return out


def _read(path: Path, which: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint '{path}' holds more than tensors and plain containers; it was not loaded"
        ) from None
    if isinstance(content, dict) and which in content and isinstance(content[which], dict):
        return content[which]
    if isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values()):
        return content
    raise UserError(f"checkpoint '{path}' holds neither a state dict nor one under '{which}'")
