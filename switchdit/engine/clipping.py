"""Clipping without ZeRO, with the experts of all ranks in the norm.

DeepSpeed's own, at stage 0, takes the mean over ranks of norms in each of which only that rank's experts count.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed import comm as dist

from switchdit.moe.layer import RoutedMoE


@torch.no_grad()
def clip_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Scale all gradients so that their norm is at most `engine.gradient_clipping()`; collective.

    The norm before it is what `engine.get_global_grad_norm` then returns.
    """
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    of_experts = [p.grad for p in trained if not getattr(p, "allreduce", True)]  # DeepSpeed's mark
    others = [p.grad for p in trained if getattr(p, "allreduce", True)]
    square = torch.nn.utils.get_total_norm(of_experts).square()
    mixtures = [module for module in engine.module.modules() if isinstance(module, RoutedMoE)]
    if mixtures:
        dist.all_reduce(square, group=mixtures[0].deepspeed_moe.ep_group)
    norm = (torch.nn.utils.get_total_norm(others).square() + square).sqrt()
    torch.nn.utils.clip_grads_with_norm_(trained, engine.gradient_clipping(), norm)
    engine._global_grad_norm = norm.item()
