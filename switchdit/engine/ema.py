"""Exponential moving average of the weights, in float32, sharded like the optimizer's master weights."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor

from switchdit.engine.global_state import gather_experts, local_view


class Ema:
    """``shadow <- decay * shadow + (1 - decay) * master`` for this rank's part of the float32 master weights.

    Under ZeRO-1 and 2 that is the partition beside the optimizer's, so no rank holds a full copy; under stage 0 it is
    the parameters themselves. bf16 weights are never averaged: their rounding alone moves the mean by 3e-4.
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
        """Call after every optimizer step."""
        torch._foreach_lerp_(self.shadow, self.masters, 1 - self.decay)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model, float32 on the CPU, experts under global ids; collective, the whole on every rank."""
        full = {}
        for parameter, name in self.names.items():
            if not parameter.requires_grad:
                full[name] = parameter.detach().float()
            elif self.sharded:
                full[name] = self._gather(parameter)
        if not self.sharded:
            trainable = (name for p, name in self.names.items() if p.requires_grad)
            full |= dict(zip(trainable, self.shadow, strict=True))
        return {name: value.cpu() for name, value in gather_experts(self.engine.module, full).items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take this rank's part of what `state_dict` returned, in any topology."""
        local = local_view(self.engine.module, state_dict)
        if not self.sharded:
            trainable = (name for p, name in self.names.items() if p.requires_grad)
            for shadow, name in zip(self.shadow, trainable, strict=True):
                shadow.copy_(local[name])
            return
        for parameter, name in self.names.items():
            if parameter.requires_grad and (fragment := self._fragment(parameter)):
                mine, start, numel = fragment
                mine.copy_(local[name].flatten()[start : start + numel])

    def _fragment(self, parameter: Tensor) -> tuple[Tensor, int, int] | None:
        """This rank's piece of a parameter: a view of ``shadow``, and where it starts in the flattened parameter."""
        mapping = parameter._hp_mapping
        if mapping is None:  # lives wholly on other ranks
            return None
        where, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        mine = self.shadow[mapping.param_group_index].narrow(0, where.start, where.numel)
        return mine, whole.start, whole.numel

    def _gather(self, parameter: Tensor) -> Tensor:
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if fragment := self._fragment(parameter):
            mine, start, numel = fragment
            full[start : start + numel] = mine
        dist.all_reduce(full, group=parameter._dp_group)
        return full.view_as(parameter)
