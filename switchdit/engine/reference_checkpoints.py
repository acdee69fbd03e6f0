"""Weights of the authors' own code, and what `tools/convert_checkpoint.py` makes of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from switchdit.engine.checkpoint_folder import MODEL_METADATA
from switchdit.engine.global_state import EXPERTS, global_names, load_global_state_dict
from switchdit.engine.inert_pickle import TensorRecord, read_tensors
from switchdit.engine.reference_names import (
    CHANNEL_MASK,
    PRIOR,
    check_known_to_authors,
    derived_tables,
    to_author_names,
    to_our_names,
    top_k_of_prior,
    with_one_channel_mask,
)
from switchdit.errors import UserError
from switchdit.models import SYSTEMS, model_fields, system_of

ENTRIES = ("ema", "model")
WRAPPERS = ("state_dict", "module")  # how other trainers (the second is DeepSpeed) call the entry
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def load_reference_checkpoint(
    model: nn.Module, path_or_state_dict: str | os.PathLike | dict[str, Any], which: str = "ema"
) -> None:
    """Load the authors' weights of DiT, DTR, Switch-DiT or Diff-MoE into a model from `build_model`, any ``ep_size``.

    Args:
        path_or_state_dict: tensors under the authors' names, or a training checkpoint that holds them under ``which``;
            as a dict, a ``.safetensors`` file or a ``torch.save`` file, of which nothing is ever executed. Or a file
            that `tools/convert_checkpoint.py` wrote, or the ``ema.safetensors`` of a run.
        which: ``"ema"`` or ``"model"``: the entry taken from a training checkpoint.

    Raises:
        UserError: a file that cannot be read or asks for functions; entries that are missing, extra or misshapen, by
            name; weights that were trained with another routing. The model is then unchanged.
    """
    system = next((name for name, model_class in SYSTEMS.items() if type(model) is model_class), type(model).__name__)
    if isinstance(path_or_state_dict, dict):
        source, described = "the state dict", None
        weights = choose_state_dict(path_or_state_dict, which, source, Tensor)
    else:
        source = f"checkpoint '{path_or_state_dict}'"
        weights, described = read_weights(path_or_state_dict, which)
    if described is None:
        check_known_to_authors(system, vars(model))
        weights = with_one_channel_mask(weights, source)
        check_fit(model, system, weights, source)
        _check_routing(model, weights, source)
        weights = to_our_names(system, weights)
    else:
        _check_description(model, system, described, source)
    load_global_state_dict(model, weights, source)


def read_weights(path: str | os.PathLike, which: str = "ema") -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, and for one of `tools/convert_checkpoint.py` (our names) the arguments of `build_model`.

    Raises:
        UserError: see `load_reference_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint '{path}' {problem}")
    source = f"checkpoint '{path}'"
    if path.suffix != ".safetensors":
        return read_tensors(path, lambda content: choose_state_dict(content, which, source, TensorRecord)), None
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get(MODEL_METADATA)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{source} cannot be read: {str(problem).splitlines()[0]}") from None
    weights = choose_state_dict(weights, which, source, Tensor)
    return weights, None if described is None else _parsed(described, source)


def choose_state_dict(content: Any, which: str, source: str, leaf: type) -> dict[str, Any]:
    """The state dict in ``content``: its entry ``which``, that of a wrapper, or itself; prefixes of wrappers removed.

    Args:
        leaf: the type of its values.
    """
    if which not in ENTRIES:
        raise UserError(f"which is {which!r}; it must be {' or '.join(ENTRIES)}")
    if not _has_names(content):
        raise UserError(f"{source} holds no state dict")
    entry = next((name for name in (which, *WRAPPERS) if isinstance(content.get(name), dict)), None)
    if entry is None and any(isinstance(value, dict) for value in content.values()):
        raise UserError(f"{source} has no entry '{which}'; it has: {', '.join(content)}")
    weights = content if entry is None else content[entry]
    where = f" under '{entry}'" if entry else ""
    if not weights or not _has_names(weights):
        raise UserError(f"{source} holds no state dict{where}: {'it has other keys' if weights else 'it is empty'}")
    if others := [name for name, value in weights.items() if not isinstance(value, leaf)]:
        raise UserError(f"{source} holds no state dict{where}: {', '.join(others[:3])} are no tensors")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _has_names(content: Any) -> bool:
    """A dict whose keys are text fit for a message."""
    return isinstance(content, dict) and all(isinstance(name, str) and name.isprintable() for name in content)


def check_fit(model: nn.Module, system: str, weights: dict[str, Tensor], source: str) -> None:
    """Raise `UserError` that lists, by the authors' names, what is missing, extra or misshapen for ``model``."""
    local = model.state_dict()
    of_one_expert = re.compile(re.escape(EXPERTS) + r"\d+\.")
    ours = {n: local[n if n in local else of_one_expert.sub(f"{EXPERTS}0.", n)] for n in global_names(model)}
    expected = to_author_names(system, {name: torch.empty_like(value, device="meta") for name, value in ours.items()})
    tables = derived_tables(system, fields_of(model))
    missing = sorted(set(expected) - set(weights))
    extra = sorted(set(weights) - set(expected) - set(tables))
    misshapen = sorted(
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in {**expected, **tables}.items()
        if name in weights and weights[name].shape != value.shape
    )
    problems = {"missing": missing, "extra": extra, "misshapen": misshapen}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise UserError(f"{source} does not fit the model; {listed}")


def fields_of(model: nn.Module) -> dict[str, Any]:
    """What `derived_tables` asks of `model_fields`, from a model."""
    return {**vars(model), "depth": len(model.blocks), "channel_mask": getattr(model, "mask_kind", None)}


def _check_routing(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Shapes do not tell k, alpha and beta; the authors' buffers do."""
    if CHANNEL_MASK in weights and not torch.equal(weights[CHANNEL_MASK].float(), model.task_channel_map().cpu()):
        raise UserError(
            f"{source} was trained with another channel mask ('{CHANNEL_MASK}') than that of "
            f"alpha ({model.alpha}) and beta ({model.beta})"
        )
    if PRIOR in weights and (top_k := top_k_of_prior(weights[PRIOR], len(model.blocks))) != model.top_k:
        raise UserError(f"{source} was trained with top_k {top_k} ('{PRIOR}'), the model has {model.top_k}")


def _check_description(model: nn.Module, system: str, described: dict[str, Any], source: str) -> None:
    """What our names and shapes do not tell apart."""
    theirs, ours = ({"system": system_of(described["name"]), **described}, {"system": system, **vars(model)})
    differing = [f for f in ("system", "num_heads", "top_k") if theirs.get(f) != ours.get(f)]
    if differing:
        listed = "; ".join(f"{f} {theirs.get(f)} instead of {ours.get(f)}" for f in differing)
        raise UserError(f"{source} is of another model: {listed}")
    _check_routing(model, derived_tables(system, described), source)


def _parsed(described: str, source: str) -> dict[str, Any]:
    try:
        model = json.loads(described)
        return {"name": model["name"], **model_fields(**model)}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{source} has metadata '{MODEL_METADATA}' that describe no model: {problem}") from None
