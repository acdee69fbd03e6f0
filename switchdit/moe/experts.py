"""The experts of Switch-DiT: single linear layers that start at zero, so that the mask starts at one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearExpert(nn.Module):
    """``E(z) = z W + b`` with ``weight`` (D, D) applied from the right and ``bias`` (D,), both initially zero."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, z: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return z @ self.weight + self.bias


def stacked(experts: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Weights (M, D, D) and biases (M, D) of a list of `LinearExpert`, differentiable."""
    return torch.stack([e.weight for e in experts]), torch.stack([e.bias for e in experts])
