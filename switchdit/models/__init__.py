"""Every published size by its name, and `build_model`."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import nn

from switchdit.errors import UserError, nearest
from switchdit.models.diff_moe import DiffMoE
from switchdit.models.dit import DiT
from switchdit.models.dtr import CHANNEL_MASKS, DTR
from switchdit.models.multi_expert import MultiExpertDiT
from switchdit.models.switch_dit import GATES, INTEGRATIONS, SwitchDiT
from switchdit.moe.layer import check_mixture

SYSTEMS: dict[str, type[nn.Module]] = {
    "DiT": DiT,
    "DTR": DTR,
    "Switch-DiT": SwitchDiT,
    "Diff-MoE": DiffMoE,
    "Multi-Expert-DiT": MultiExpertDiT,
}

# DiT, Table 1
SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)

COMMON_FIELDS = {
    "input_size": 32,
    "in_channels": 4,
    "mlp_ratio": 4.0,
    "num_classes": 1000,
    "class_dropout_prob": 0.1,
    "learn_sigma": True,
    "num_timesteps": 1000,
}
# DTR, Sec. 5.1; Switch-DiT, Sec. 5.1; Diff-MoE, the authors' code
SYSTEM_FIELDS: dict[str, dict[str, Any]] = {
    "DiT": {},
    "DTR": {"alpha": 4.0, "beta": 0.8, "channel_mask": "dtr"},
    "Switch-DiT": {
        "num_experts": 3,
        "top_k": 2,
        "ep_size": 1,
        "gate": "plain",
        "integration": "multiply_skip_one",
    },
    "Diff-MoE": {"num_experts": 8, "top_k": 2, "ep_size": 1, "num_shared_experts": 2},
    "Multi-Expert-DiT": {"num_denoisers": 4},
}
# Diff-MoE, the smaller ones that the authors set beside dense DiT
V2_FIELDS = {"mlp_ratio": 5 / 3, "num_shared_experts": 1}
CHOICES = {"channel_mask": CHANNEL_MASKS, "gate": GATES, "integration": INTEGRATIONS}

MODEL_NAMES = [f"{system}-{size}/{patch}" for system in SYSTEMS for size in SIZES for patch in PATCH_SIZES]
MODEL_NAMES += [f"Diff-MoE-{size}/2_v2" for size in ("S", "B", "L")]
NAMES_IN_SHORT = f"{{{','.join(SYSTEMS)}}}-{{{','.join(SIZES)}}}/{{2,4,8}}, Diff-MoE-{{S,B,L}}/2_v2"


def model_fields(name: str, **overrides: Any) -> dict[str, Any]:
    """The size table's row for ``name`` with ``overrides``, checked.

    Raises:
        UserError (a ValueError): unknown name or field, with the nearest valid one, or numbers that do not fit.
    """
    if name not in MODEL_NAMES:
        raise UserError(f"model '{name}' is unknown{nearest(name, MODEL_NAMES, NAMES_IN_SHORT)}")
    system, size, patch = _split_name(name)
    fields = {**COMMON_FIELDS, **SIZES[size], "patch_size": patch, **SYSTEM_FIELDS[system]}
    if name.endswith("_v2"):
        fields |= V2_FIELDS
    if overrides.get("num_classes") == 1:  # one class: nothing to guide towards
        fields["class_dropout_prob"] = 0.0
    for key, value in overrides.items():
        if key not in fields:
            raise UserError(f"model field '{key}' is unknown for {name}{nearest(key, fields)}")
        fields[key] = _same_type(key, value, fields[key])
    _check(fields)
    return fields


def build_model(name: str, **overrides: Any) -> nn.Module:
    """A model by its published name, e.g. ``build_model("Switch-DiT-S/2", num_classes=10, depth=6)``.

    Works in a single process without torch.distributed; with ``ep_size > 1`` torch.distributed must be initialised.

    Args:
        name: ``{DiT, DTR, Switch-DiT, Diff-MoE, Multi-Expert-DiT}-{S, B, L, XL}/{2, 4, 8}``, or
            ``Diff-MoE-{S, B, L}/2_v2``.
        overrides: any of the fields that `model_fields` returns.

    Raises:
        UserError (a ValueError): see `model_fields`.
    """
    model_class = SYSTEMS[_split_name(name)[0]] if name in MODEL_NAMES else DiT
    return model_class(**model_fields(name, **overrides))


def system_of(name: str) -> str:
    """``"Switch-DiT"`` of ``"Switch-DiT-S/2"``."""
    return _split_name(name)[0]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters in total, and those active for a timestep (Diff-MoE: a token).

    Active are all but M - k experts a block; of a multi-expert model, one denoiser. Fixed positions count, as they do
    in the published figures. With ``ep_size > 1`` experts of all ranks count.
    """
    total = sum(p.numel() for p in model.parameters())
    if denoisers := getattr(model, "denoisers", None):
        return total, total // len(denoisers)
    idle = 0
    for block in getattr(model, "blocks", []):
        if moe := getattr(block, "moe", None):
            expert = sum(p.numel() for p in moe.deepspeed_moe.experts.deepspeed_experts[0].parameters())
            total += expert * (moe.num_experts - moe.num_local_experts)
            idle += expert * (moe.num_experts - moe.gate.k)
    return total, total - idle


def _split_name(name: str) -> tuple[str, str, int]:
    stem, patch = name.split("/")
    system, size = stem.rsplit("-", 1)
    return system, size, int(patch.removesuffix("_v2"))


def _same_type(key: str, value: Any, like: Any) -> Any:
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise UserError(f"model field '{key}' must be one of {', '.join(CHOICES[key])}, not {value!r}")
        return value
    if isinstance(like, float) and isinstance(value, str):  # YAML reads 1e-1, without a dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(like, bool):
        valid = isinstance(value, bool)
    elif isinstance(like, int):
        valid = isinstance(value, int) and not isinstance(value, bool)
    else:
        valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid:
        raise UserError(f"model field '{key}' must be of type {type(like).__name__}, not {value!r}")
    return type(like)(value)


def _check(f: dict[str, Any]) -> None:
    for key in (*SIZES["S"], "input_size", "in_channels", "num_classes", "patch_size", "num_timesteps"):
        if f[key] < 1:
            raise UserError(f"model field '{key}' must be at least 1, not {f[key]}")
    if f["input_size"] % f["patch_size"]:
        raise UserError(f"input_size ({f['input_size']}) must be divisible by patch_size ({f['patch_size']})")
    if f["hidden_size"] % f["num_heads"]:
        raise UserError(f"hidden_size ({f['hidden_size']}) must be divisible by num_heads ({f['num_heads']})")
    if f["hidden_size"] % 4:
        raise UserError(f"hidden_size ({f['hidden_size']}) must be divisible by 4, for 2-D sine and cosine positions")
    if "num_experts" in f:
        check_mixture(f["num_experts"], f["top_k"], f["ep_size"])
    if "num_shared_experts" in f:
        if f["num_shared_experts"] < 1:
            raise UserError(f"model field 'num_shared_experts' must be at least 1, not {f['num_shared_experts']}")
        if f["hidden_size"] % (4 * f["num_heads"]):
            raise UserError(
                f"hidden_size ({f['hidden_size']}) must be divisible by 4 num_heads ({4 * f['num_heads']}), for 2-D "
                "rotary positions"
            )
    if not 1 <= f["mlp_ratio"] * f["hidden_size"] < 2**31:
        raise UserError(f"mlp_ratio ({f['mlp_ratio']}) must be a number above 0 that gives the MLP a width")
    if f.get("num_denoisers", 1) < 1:
        raise UserError(f"model field 'num_denoisers' must be at least 1, not {f['num_denoisers']}")
    if "beta" in f and not 1 <= int(f["hidden_size"] * f["beta"]) <= f["hidden_size"]:
        raise UserError(f"beta ({f['beta']}) must lie between 1 / hidden_size and 1: the share of channels in use")
    if f.get("alpha", 1) <= 0:
        raise UserError(f"alpha ({f['alpha']}) must be above 0")
    if not 0 <= f["class_dropout_prob"] <= 1:
        raise UserError(f"class_dropout_prob ({f['class_dropout_prob']}) must lie between 0 and 1")
