"""Loading DeepSpeed's checkpoint files into another topology: more or fewer processes, another ep_size, ZeRO stage,
precision, order of the flat partitions, or class of optimizer of the same family.

DeepSpeed itself reads them by position: it loads them right where topology, partitions and optimizer are those they
were saved with. Some other cases it refuses, others it loads wrong without a word (another order of the partitions;
its universal checkpoints with ep_size > 1). Everything is found here by a parameter's name with its expert's global id:

- ZeRO 1 and 2: each process's file holds a piece of the flat float32 weights and of the optimizer's state, with a table
  of the parameters in it. Dense parameters are spread over all W processes, experts over the W / E that share an
  expert-parallel rank; the pieces of a parameter follow each other in the order of the processes.
- ZeRO 0: weights are in the model's and the experts' files, optimizer state in a file for each expert-parallel rank, by
  position; ``optimizer_names`` in state.json says which parameter stands where.

Files are mapped, not read, so that a process touches what it needs.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import filter as matching
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor

from switchdit.engine.checkpoint_writer import load_tensors
from switchdit.engine.fragments import fragment
from switchdit.engine.global_state import global_name, global_name_of
from switchdit.engine.optimizers import base_optimizer
from switchdit.errors import UserError
from switchdit.files import inside

MASTER = "master"  # the float32 weights, beside the optimizer's own names such as exp_avg
MODEL_FILE = "mp_rank_00_model_states.pt"
EXPERT_FILES = "layer_*_expert_*_mp_rank_00_model_states.pt"
ADAMS = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}  # the same arithmetic and the same state in all of them
VARIANTS = ("amsgrad", "centered", "momentum")  # settings on which an optimizer's state or its meaning depends


@dataclass
class SavedRun:
    """What a checkpoint holds, whatever wrote it.

    Attributes:
        pieces: global parameter name -> kind (`MASTER`, ``exp_avg``, ...) -> pieces of the flattened tensor in order.
        scalars: global parameter name -> the optimizer's single numbers for it, such as ``step``, which counts the
            steps that its moments have seen.
        indivisible: kinds of optimizer state that are not one value for each weight.
        other: what is no trained parameter, e.g. fixed position embeddings.
        counters: DeepSpeed's, such as ``global_steps``.
    """

    pieces: dict[str, dict[str, list[Tensor]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    indivisible: set[str] = field(default_factory=set)
    other: dict[str, Tensor] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    def kinds(self, name: str) -> list[str]:
        return list(self.pieces[name])

    def numel(self, name: str) -> int:
        """How many of a parameter's weights the checkpoint holds; 0 if it does not know the name."""
        return sum(piece.numel() for piece in self.pieces[name][MASTER]) if name in self.pieces else 0

    def whole(self, name: str, kind: str) -> Tensor:
        """The flattened tensor, float32 on the CPU."""
        pieces = self.pieces[name][kind]
        return pieces[0].flatten() if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])


def read_saved_run(path: Path, state: dict[str, Any]) -> SavedRun:
    """Open the DeepSpeed files of the checkpoint ``path``; ``state`` is its state.json.

    Raises:
        UserError: if a file is missing or unreadable, or a version wrote them that did not note what this needs.
    """
    saved = SavedRun()
    # a folder may hold more than was written into it; what an older version wrote has no table of files
    names = list(state["files"]) if "files" in state else sorted(file.name for file in path.iterdir())
    model = _load(path, MODEL_FILE)
    saved.counters = {key: model[key] for key in ("global_steps", "global_samples", "skipped_steps")}
    num_experts = (model.get("num_experts") or [1])[0]  # the same in every layer
    world_size, ep_size = state["topology"]["world_size"], state["topology"]["ep_size"]
    num_local = num_experts // ep_size
    if state["topology"]["zero_stage"] == 0:
        _read_whole(saved, path, state, names, model, ep_size, num_local)
    else:
        for rank in range(world_size):
            pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            file = (matching(names, pattern) or [pattern.removeprefix("*")])[0]
            _read_partition(saved, _load(path, file)["optimizer_state_dict"], rank % ep_size * num_local)
    saved.other = {name: value for name, value in model["module"].items() if name not in saved.pieces}
    return saved


def _load(path: Path, name: str) -> dict[str, Any]:
    try:
        return load_tensors(inside(path, name), mmap=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint '{path}' is not whole: it has no file {name}") from None
    except (OSError, RuntimeError, EOFError, UnpicklingError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"checkpoint '{path}': {name} cannot be read: {reason}") from None


def _read_partition(saved: SavedRun, partition: dict[str, Any], first_expert: int) -> None:
    """Add one process's piece of everything, a ZeRO 1 or 2 file."""
    optimizer = partition["base_optimizer_state"]
    groups = zip(
        partition["single_partition_of_fp32_groups"], partition["group_paddings"], partition["param_slice_mappings"],
        strict=True,
    )  # fmt: skip
    for i, (master, padding, table) in enumerate(groups):
        moments = optimizer["state"].get(i, {})
        flat = {MASTER: master, **_elementwise(saved, moments, master.numel() + padding)}  # masters are cut to size
        for local_name, where in table.items():
            name = global_name(local_name, first_expert)
            for kind, value in flat.items():
                saved.pieces[name][kind].append(value.narrow(0, where.start, where.numel))
            saved.scalars[name] = _scalars([moments, _counted(optimizer["param_groups"][i])])


def _read_whole(
    saved: SavedRun,
    path: Path,
    state: dict[str, Any],
    files: list[str],
    model: dict[str, Any],
    ep_size: int,
    num_local: int,
) -> None:
    """Add everything of a ZeRO 0 checkpoint."""
    names = state.get("optimizer_names")
    if names is None:
        raise UserError(
            f"checkpoint '{path}' is of another topology, {state['topology']}, and was written by a version that "
            "could not be resumed elsewhere"
        )
    weights = dict(model["module"])
    for file in matching(files, EXPERT_FILES):
        weights |= _load(path, file)
    for ep_rank in range(ep_size):
        file = f"expp_rank_{ep_rank}_mp_rank_00_optim_states.pt"
        # with experts the model's file repeats the state of the first process
        optimizer = _load(path, file)["optimizer"] if num_local > 1 or ep_size > 1 else model["optimizer"]
        position = 0
        for group, settings in zip(names, optimizer["param_groups"], strict=True):
            states = [optimizer["state"].get(position + i, {}) for i in range(len(group))]
            position += len(group)
            scalars = _scalars([*states, _counted(settings)])
            for local_name, moments in zip(group, states, strict=True):
                name = global_name(local_name, ep_rank * num_local)
                if name in saved.pieces:  # dense parameters stand in every file
                    continue
                if name not in weights:
                    raise UserError(f"checkpoint '{path}' is not whole: no file in it has {name}")
                saved.pieces[name][MASTER] = [weights[name]]
                for kind, value in _elementwise(saved, moments, weights[name].numel()).items():
                    saved.pieces[name][kind] = [value]
                saved.scalars[name] = scalars


def _elementwise(saved: SavedRun, moments: dict[str, Any], numel: int) -> dict[str, Tensor]:
    """Optimizer state with one value for each of ``numel`` weights; other tensors are noted as indivisible."""
    tensors = {kind: value for kind, value in moments.items() if isinstance(value, Tensor) and value.dim() > 0}
    saved.indivisible |= {kind for kind, value in tensors.items() if value.numel() != numel}
    return {kind: value for kind, value in tensors.items() if value.numel() == numel}


def _scalars(states: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Single numbers of the optimizer's states of a group, the largest of each.

    DeepSpeed's FusedAdam counts its steps in the last parameter of a group alone, the others keep 0.
    """
    found: dict[str, float] = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
                found[key] = max(found.get(key, -float("inf")), float(value))
    return found


def _counted(settings: dict[str, Any]) -> dict[str, Any]:
    """The steps that apex's FusedAdam counts, in the settings of a group instead of the state of its weights."""
    return {key: value for key, value in settings.items() if key == "step"}


def optimizer_names(engine: DeepSpeedEngine) -> list[list[str]] | None:
    """Local parameter names in the order of the optimizer's groups under ZeRO 0, the same on all processes."""
    if engine.zero_optimization_stage() != 0:
        return None  # DeepSpeed's files hold them
    names = {p: name for name, p in engine.module.named_parameters()}
    return [[names[p] for p in group["params"]] for group in engine.optimizer.param_groups]


def layout_digest(engine: DeepSpeedEngine) -> str | None:
    """SHA-256 over which values of which parameter stand where in every process's flat partitions; collective.

    DeepSpeed's own loading is right where it is the same. None under ZeRO 0, which has no partitions.
    """
    if engine.zero_optimization_stage() == 0:
        return None
    zero_optimizer = engine.optimizer
    mine = [
        [partition.numel(), [[name, where.start, where.numel] for name, where in table.items()]]
        for partition, table in zip(
            zero_optimizer.single_partition_of_fp32_groups, zero_optimizer._param_slice_mappings, strict=True
        )
    ]
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _sha256(mine))
    return _sha256(everyone)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def optimizer_identity(engine: DeepSpeedEngine) -> dict[str, str]:
    """``family``: what it computes and keeps, e.g. AdamW; ``class``: which implementation, e.g. FusedAdam's.

    State goes from one class to another of the same family through `load_resharded`.
    """
    optimizer = base_optimizer(engine)
    settings = optimizer.param_groups[0]
    family = type(optimizer).__name__
    if family in ADAMS:  # with weight decay on the weights, or as a part of the gradient that its moments average
        decoupled = getattr(optimizer, "adam_w_mode", settings.get("decoupled_weight_decay"))
        family = "AdamW" if decoupled else "Adam"
    variants = [key for key in VARIANTS if settings.get(key)]
    return {
        "family": " ".join([family, *(["with"] if variants else []), *variants]),
        "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
    }


def check_optimizer(path: Path, state: dict[str, Any], engine: DeepSpeedEngine) -> None:
    """Check that the run's optimizer can go on with the checkpoint's state; an older version did not note its own.

    Raises:
        UserError: if it is of another family.
    """
    ours = optimizer_identity(engine)["family"]
    theirs = state.get("optimizer", {}).get("family", ours)
    if theirs != ours:
        raise UserError(
            f"checkpoint '{path}' was trained with {theirs}, this run's optimizer is {ours}: set 'optimizer' in the "
            f"DeepSpeed config to {theirs}, or train anew in another run_dir"
        )


@torch.no_grad()
def load_resharded(path: Path, state: dict[str, Any], engine: DeepSpeedEngine) -> None:
    """Put weights, optimizer state and counters of the checkpoint ``path`` into ``engine``, whatever its topology.

    Raises:
        UserError: if the checkpoint cannot be read, lacks weights, or has optimizer state that cannot be divided; the
            engine is then unchanged.
    """
    saved = read_saved_run(path, state)
    if saved.indivisible:
        raise UserError(
            f"checkpoint '{path}' is of another topology or optimizer, and its optimizer state "
            f"{', '.join(sorted(saved.indivisible))} cannot be divided anew: resume it where it was saved"
        )
    model, optimizer = engine.module, base_optimizer(engine)
    named = global_name_of(model)
    trained = {named(local_name): p for local_name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if (held := saved.numel(name)) != parameter.numel():
            raise UserError(f"checkpoint '{path}' holds {held:,} of the {parameter.numel():,} values of {name}")
    for name, parameter in trained.items():
        parameter.copy_(saved.whole(name, MASTER).view_as(parameter))
        if engine.zero_optimization_stage() > 0:
            _load_fragment(engine.optimizer, parameter, saved, name)
        else:
            moments = {
                kind: saved.whole(name, kind).view_as(parameter).to(parameter.device, copy=True)
                for kind in saved.kinds(name)
                if kind != MASTER
            }
            optimizer.state[parameter].update(moments)
            _set_scalars(optimizer, parameter, saved.scalars[name])
    model.load_state_dict(saved.other, strict=False)
    for counter, value in saved.counters.items():
        setattr(engine, counter, value)


def _load_fragment(zero_optimizer: Any, parameter: Tensor, saved: SavedRun, name: str) -> None:
    """This process's piece of a parameter: its float32 weights and the optimizer's state beside them."""
    found = fragment(parameter)
    if found is None:  # lives wholly on other processes
        return
    partition = zero_optimizer.single_partition_of_fp32_groups[found.group]
    moments = zero_optimizer.optimizer.state[partition]
    for kind in saved.kinds(name):
        if kind != MASTER and kind not in moments:
            moments[kind] = torch.zeros_like(partition)
        target = partition if kind == MASTER else moments[kind]
        piece = saved.whole(name, kind)[found.start_in_parameter :][: found.numel]
        target.narrow(0, found.start, found.numel).copy_(piece)
    _set_scalars(zero_optimizer.optimizer, partition, saved.scalars[name])


def _set_scalars(optimizer: torch.optim.Optimizer, parameter: Tensor, scalars: dict[str, float]) -> None:
    """PyTorch's optimizers keep them as tensors, beside the moments where a kernel reads them; DeepSpeed's as int;
    apex's with the settings.
    """
    settings = optimizer.param_groups[0]
    if type(optimizer).__module__.startswith("apex."):
        for group in optimizer.param_groups:
            group.update({key: int(value) for key, value in scalars.items()})
        return
    device = parameter.device if settings.get("fused") or settings.get("capturable") else None
    of_torch = type(optimizer).__module__.startswith("torch.")
    optimizer.state[parameter].update(
        {key: torch.tensor(value, device=device) if of_torch else int(value) for key, value in scalars.items()}
    )
