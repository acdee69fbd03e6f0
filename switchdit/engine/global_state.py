"""State dicts whose experts carry global ids, whatever rank they live on.

The names are those of the same model with ``ep_size=1``, so that such a state dict loads into any topology.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from switchdit.errors import UserError
from switchdit.moe.layer import RoutedMoE

EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


def mixtures(model: nn.Module) -> Iterator[tuple[str, RoutedMoE]]:
    """All mixtures of a model, each with what the names of its experts' parameters begin with."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedMoE):
            yield f"{name}.{EXPERTS}", module


def global_name(local_name: str, first_expert: int) -> str:
    """A parameter's name with ``ep_size=1``, given the global id of the first expert of the process it lives on."""
    layer, is_expert, rest = local_name.partition(EXPERTS)
    if not is_expert:
        return local_name
    local, field = rest.split(".", 1)
    return f"{layer}{EXPERTS}{first_expert + int(local)}.{field}"


def global_name_of(model: nn.Module) -> Callable[[str], str]:
    """What gives the global name of this process's parameters."""
    first_expert = {prefix: moe.local_experts.start for prefix, moe in mixtures(model)}

    def named(local_name: str) -> str:
        return global_name(local_name, next((n for p, n in first_expert.items() if local_name.startswith(p)), 0))

    return named


def gather_experts(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace this rank's experts in ``tensors`` (parameter name -> value) by all experts, under global ids.

    Collective over the expert-parallel group when ``ep_size > 1``; every rank gets the whole.
    """
    out = dict(tensors)
    for prefix, moe in mixtures(model):
        if moe.ep_size == 1:
            continue
        group = groups._get_expert_parallel_group(moe.expert_group_name)
        for name in [n for n in tensors if n.startswith(prefix)]:
            local, field = name.removeprefix(prefix).split(".", 1)
            value = out.pop(name).contiguous()
            parts = [torch.empty_like(value) for _ in range(moe.ep_size)]
            dist.all_gather(parts, value, group=group)
            for rank, part in enumerate(parts):
                out[f"{prefix}{rank * moe.num_local_experts + int(local)}.{field}"] = part
    return out


def global_names(model: nn.Module) -> list[str]:
    """Names of the state dict of the same model with ``ep_size=1``."""
    of_layer = dict(mixtures(model))
    names = []
    for name in model.state_dict():
        prefix = next((p for p in of_layer if name.startswith(p)), None)
        if prefix is None:
            names.append(name)
        elif name.startswith(f"{prefix}0."):
            field = name.removeprefix(f"{prefix}0.")
            names.extend(f"{prefix}{j}.{field}" for j in range(of_layer[prefix].num_experts))
    return names


def local_view(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a global state dict that belongs to this rank, under its local names."""
    out = dict(state_dict)
    for prefix, moe in mixtures(model):
        of_layer = {n: out.pop(n) for n in list(out) if n.startswith(prefix)}
        for name, value in of_layer.items():
            expert, field = name.removeprefix(prefix).split(".", 1)
            if int(expert) in moe.local_experts:
                out[f"{prefix}{int(expert) - moe.local_experts.start}.{field}"] = value
    return out


def load_global_state_dict(model: nn.Module, state_dict: dict[str, Tensor], source: str = "the state dict") -> None:
    """Load a state dict with global expert ids into ``model``, whatever its ``ep_size``.

    Raises:
        UserError: listing missing, extra and misshapen entries by name; the model is then unchanged.
    """
    expected = set(global_names(model))
    missing = sorted(expected - set(state_dict))
    extra = sorted(set(state_dict) - expected)
    local = local_view(model, state_dict)
    misshapen = sorted(
        f"{name} {tuple(local[name].shape)} instead of {tuple(value.shape)}"
        for name, value in model.state_dict().items()
        if name in local and local[name].shape != value.shape
    )
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(local)


@torch.no_grad()
def global_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with all experts under global ids; collective when ``ep_size > 1``."""
    return gather_experts(model, {name: value.detach() for name, value in model.state_dict().items()})
