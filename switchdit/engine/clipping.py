"""The norm of the whole model's gradient, with the experts of all ranks in it, and clipping by it.

DeepSpeed's own, at stage 0, takes the mean over ranks of norms in each of which only that rank's experts count.
"""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor

from switchdit.moe.layer import RoutedMoE

EPSILON = 1e-6  # added to the norm, as by PyTorch and DeepSpeed


@torch.no_grad()
def global_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """The norm before clipping, scalar float32 on the device, the same on all processes; collective.

    It is not finite where any process's part of the gradient is not. To be called when the gradients of a step are
    reduced. No host synchronisation.
    """
    if engine.zero_optimization_stage() > 0:  # every value of it is on one process
        square = _square(g for part in engine.optimizer.averaged_gradients.values() for g in part).to(engine.device)
        dist.all_reduce(square)
        return square.sqrt().float()
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    square = _square(p.grad for p in trained if not getattr(p, "allreduce", True))  # of experts, by DeepSpeed's mark
    mixtures = [module for module in engine.module.modules() if isinstance(module, RoutedMoE)]
    if mixtures:
        square = square.to(engine.device)
        dist.all_reduce(square, group=mixtures[0].deepspeed_moe.ep_group)
    return (square + _square(p.grad for p in trained if getattr(p, "allreduce", True))).sqrt().float()


def clipping_divisor(norm: Tensor, limit: float) -> Tensor:
    """What to divide a gradient of this norm by, so that its norm is at most ``limit``: at least 1."""
    return ((norm + EPSILON) / limit).clamp(min=1.0)


def clip_alike(engine: deepspeed.DeepSpeedEngine) -> None:
    """Clip with every optimizer as torch's fused ones do, by a division; DeepSpeed multiplies, which rounds otherwise.

    Its ZeRO optimizer would also clip at what a checkpoint was trained with, not at this run's limit.
    """
    limit = engine.gradient_clipping()

    @torch.no_grad()
    def clip_under_zero(gradients: list[Tensor], norm: Tensor) -> None:
        if limit:
            torch._foreach_div_(gradients, clipping_divisor(norm, limit).to(gradients[0].device))

    @torch.no_grad()
    def clip_without() -> None:
        norm = global_norm(engine)
        clip_under_zero([p.grad for p in engine.module.parameters() if p.grad is not None], norm)
        engine._global_grad_norm = norm  # what `engine.get_global_grad_norm` returns

    engine.clip_fp32_gradients = clip_without
    if engine.zero_optimization_stage() > 0:
        engine.optimizer.unscale_and_clip_grads = clip_under_zero


def _square(gradients: Iterable[Tensor]) -> Tensor:
    """The square of their common norm, float64: on the CPU PyTorch's float32 norm keeps 3 digits of millions."""
    gradients = list(gradients)
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(gradients, dtype=torch.float64)).square().sum()
