"""Loading DeepSpeed's checkpoint files into another topology: more or fewer processes, another ep_size, ZeRO stage or
precision.

DeepSpeed itself loads them where they were saved, and nowhere else (its universal checkpoints lose experts with
ep_size > 1). Everything is found here by a parameter's name with its expert's global id:

- ZeRO 1 and 2: each process's file holds a piece of the flat float32 weights and of the optimizer's state, with a table
  of the parameters in it. Dense parameters are spread over all W processes, experts over the W / E that share an
  expert-parallel rank; the pieces of a parameter follow each other in the order of the processes.
- ZeRO 0: weights are in the model's and the experts' files, optimizer state in a file for each expert-parallel rank, by
  position; ``optimizer_names`` in state.json says which parameter stands where.

Files are mapped, not read, so that a process touches what it needs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from switchdit.engine.checkpoint_writer import load_tensors
from switchdit.engine.fragments import fragment
from switchdit.engine.global_state import global_name, mixtures
from switchdit.errors import UserError

MASTER = "master"  # the float32 weights, beside the optimizer's own names such as exp_avg
MODEL_FILE = "mp_rank_00_model_states.pt"


@dataclass
class SavedRun:
    """What a checkpoint holds, whatever wrote it.

    Attributes:
        pieces: global parameter name -> kind (`MASTER`, ``exp_avg``, ...) -> pieces of the flattened tensor in order.
        optimizer_step: global parameter name -> how many steps its moments have seen, where the optimizer counts.
        other: what is no trained parameter, e.g. fixed position embeddings.
        counters: DeepSpeed's, such as ``global_steps``.
    """

    pieces: dict[str, dict[str, list[Tensor]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    optimizer_step: dict[str, float] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    def kinds(self, name: str) -> list[str]:
        return list(self.pieces[name])

    def whole(self, name: str, kind: str) -> Tensor:
        """The flattened tensor, float32 on the CPU."""
        pieces = self.pieces[name][kind]
        return pieces[0].flatten() if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])


def read_saved_run(path: Path, state: dict[str, Any]) -> SavedRun:
    """Open the DeepSpeed files of the checkpoint ``path``; ``state`` is its state.json.

    Raises:
        UserError: if the checkpoint is of a version that did not note what this needs.
    """
    saved = SavedRun()
    model = load_tensors(path / MODEL_FILE, mmap=True)
    saved.counters = {key: model[key] for key in ("global_steps", "global_samples", "skipped_steps")}
    num_experts = (model.get("num_experts") or [1])[0]  # the same in every layer
    world_size, ep_size = state["topology"]["world_size"], state["topology"]["ep_size"]
    num_local = num_experts // ep_size
    if state["topology"]["zero_stage"] == 0:
        _read_whole(saved, path, state, model, ep_size, num_local)
    else:
        for rank in range(world_size):
            [file] = path.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            _read_partition(saved, load_tensors(file, mmap=True)["optimizer_state_dict"], rank % ep_size * num_local)
    saved.other = {name: value for name, value in model["module"].items() if name not in saved.pieces}
    return saved


def _read_partition(saved: SavedRun, partition: dict[str, Any], first_expert: int) -> None:
    """Add one process's piece of everything, a ZeRO 1 or 2 file."""
    optimizer = partition["base_optimizer_state"]
    groups = zip(
        partition["single_partition_of_fp32_groups"], partition["param_slice_mappings"], optimizer["param_groups"],
        strict=True,
    )  # fmt: skip
    for i, (master, table, settings) in enumerate(groups):
        moments = optimizer["state"].get(i, {})
        flat = {MASTER: master, **{key: value for key, value in moments.items() if _is_flat(value)}}
        steps = moments.get("step", settings.get("step"))
        for local_name, where in table.items():
            name = global_name(local_name, first_expert)
            for kind, value in flat.items():
                saved.pieces[name][kind].append(value.narrow(0, where.start, where.numel))
            if steps is not None:
                saved.optimizer_step[name] = float(steps)


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _read_whole(
    saved: SavedRun, path: Path, state: dict[str, Any], model: dict[str, Any], ep_size: int, num_local: int
) -> None:
    """Add everything of a ZeRO 0 checkpoint."""
    names = state.get("optimizer_names")
    if names is None:
        raise UserError(
            f"checkpoint '{path}' is of another topology, {state['topology']}, and was written by a version that "
            "could not be resumed elsewhere"
        )
    weights = dict(model["module"])
    for file in sorted(path.glob("layer_*_expert_*_mp_rank_00_model_states.pt")):
        weights |= load_tensors(file, mmap=True)
    for ep_rank in range(ep_size):
        file = path / f"expp_rank_{ep_rank}_mp_rank_00_optim_states.pt"
        optimizer = load_tensors(file, mmap=True)["optimizer"] if file.is_file() else model["optimizer"]
        settings = [group for group, members in zip(optimizer["param_groups"], names, strict=True) for _ in members]
        for i, local_name in enumerate(name for group in names for name in group):
            name = global_name(local_name, ep_rank * num_local)
            if name in saved.pieces:  # dense parameters stand in every file
                continue
            moments = optimizer["state"].get(i, {})
            saved.pieces[name][MASTER] = [weights[name]]
            for kind, value in moments.items():
                if _is_flat(value):
                    saved.pieces[name][kind] = [value]
            steps = moments.get("step", settings[i].get("step"))
            if steps is not None:
                saved.optimizer_step[name] = float(steps)


def optimizer_names(engine: DeepSpeedEngine) -> list[list[str]] | None:
    """Local parameter names in the order of the optimizer's groups under ZeRO 0, the same on all processes."""
    if engine.zero_optimization_stage() != 0:
        return None  # DeepSpeed's files hold them
    names = {p: name for name, p in engine.module.named_parameters()}
    return [[names[p] for p in group["params"]] for group in engine.optimizer.param_groups]


@torch.no_grad()
def load_resharded(path: Path, state: dict[str, Any], engine: DeepSpeedEngine) -> None:
    """Put weights, optimizer state and counters of the checkpoint ``path`` into ``engine``, whatever its topology."""
    saved = read_saved_run(path, state)
    model, optimizer = engine.module, engine.optimizer
    first_expert = {prefix: moe.local_experts.start for prefix, moe in mixtures(model)}
    sharded = engine.zero_optimization_stage() > 0
    for local_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = global_name(local_name, next((n for p, n in first_expert.items() if local_name.startswith(p)), 0))
        parameter.copy_(saved.whole(name, MASTER).view_as(parameter))
        steps = saved.optimizer_step.get(name)
        if sharded:
            _load_fragment(optimizer, parameter, saved, name, steps)
        else:
            moments = {
                kind: saved.whole(name, kind).view_as(parameter).to(parameter.device, copy=True)
                for kind in saved.kinds(name)
                if kind != MASTER
            }
            optimizer.state[parameter].update(moments)
            _set_step(optimizer, optimizer.state[parameter], steps)
    model.load_state_dict(saved.other, strict=False)
    for counter, value in saved.counters.items():
        setattr(engine, counter, value)


def _load_fragment(zero_optimizer: Any, parameter: Tensor, saved: SavedRun, name: str, steps: float | None) -> None:
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
    _set_step(zero_optimizer.optimizer, moments, steps)


def _set_step(optimizer: torch.optim.Optimizer, moments: dict[str, Any], steps: float | None) -> None:
    if steps is None:
        return
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        moments["step"] = torch.tensor(float(steps))
    else:  # apex's and DeepSpeed's fused ones count in their groups
        for group in optimizer.param_groups:
            group["step"] = int(steps)
