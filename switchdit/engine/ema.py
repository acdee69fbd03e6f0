"""Exponential moving average of the weights, in float32, sharded like the optimizer's master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor

from switchdit.engine.fragments import fragment
from switchdit.engine.global_state import gather_experts, global_name_of


class Ema:
    """``shadow <- decay * shadow + (1 - decay) * master`` for this rank's part of the float32 master weights.

    Under ZeRO-1 and 2 that is the partition beside the optimizer's, so no rank trains with a full copy (the first
    gathers one in host memory to save it); under stage 0 it is the parameters themselves. bf16 weights are never
    averaged: their rounding alone moves the mean by 3e-4.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float):
        self.engine, self.decay = engine, decay
        self.names = {p: name for name, p in engine.module.named_parameters()}
        partitions = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
        self.sharded = partitions is not None
        self.masters = list(partitions) if self.sharded else [p for p in self.names if p.requires_grad]
        self.shadow = [m.detach().clone() for m in self.masters]
        assert all(s.dtype == torch.float32 for s in self.shadow)

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step that changed weights, before the next one.

        A pass over all of them, one kernel; no host synchronisation.
        """
        torch._foreach_lerp_(self.shadow, self.masters, 1 - self.decay)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model, float32 on the CPU, experts under global ids; collective.

        The first process gets the whole, parameter by parameter; the others get nothing.
        """
        full = {}
        for part in self._whole_parameters():
            if dist.get_rank() == 0:
                full |= {name: value.to("cpu", copy=True) for name, value in part.items()}
        return full

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor]) -> None:
        """Take this rank's part of what `state_dict` returned, in any topology; ``read`` gives a parameter by name."""
        global_name = global_name_of(self.engine.module)
        shadows = iter(self.shadow)
        for parameter, name in self.names.items():
            if not parameter.requires_grad:
                continue
            if not self.sharded:
                next(shadows).copy_(read(global_name(name)))
            elif found := fragment(parameter):
                mine = self.shadow[found.group].narrow(0, found.start, found.numel)
                mine.copy_(read(global_name(name)).flatten()[found.start_in_parameter :][: found.numel])

    def _whole_parameters(self) -> Iterator[dict[str, Tensor]]:
        """One after the other, on the processes of the first expert-parallel group; of an expert, all its peers."""
        model = self.engine.module
        in_first_group = dist.get_rank() < getattr(model, "ep_size", 1)
        shadows = iter(self.shadow)
        for parameter, name in self.names.items():
            if not parameter.requires_grad:
                value = parameter.detach().float()
            else:
                value = self._collect(parameter) if self.sharded else next(shadows)
            if in_first_group:
                yield gather_experts(model, {name: value})

    def _collect(self, parameter: Tensor) -> Tensor:
        """The average of a whole parameter, on the first process of those that share it."""
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if found := fragment(parameter):
            mine = self.shadow[found.group].narrow(0, found.start, found.numel)
            full[found.start_in_parameter :][: found.numel] = mine
        group = parameter._dp_group
        dist.reduce(full, dist.get_global_rank(group, 0), group=group)
        return full.view_as(parameter)
