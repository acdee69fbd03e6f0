"""The gate of a timestep mixture of experts: functions of the timestep embedding alone, always in float32 or better.

N = samples, D = width of the timestep embedding, M = experts, k = experts chosen
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_probs(
    e_t: Tensor, weight: Tensor, bias: Tensor, noise_weight: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """``softmax(Linear(SiLU(e_t)))`` (Switch-DiT, Eq. 3), free of autocast.

    With ``noise`` as in noisy top-k gating (Shazeer et al. 2017, Eq. 4): ``noise * softplus(Linear(SiLU(e_t)))``
    is added before the softmax.

    Args:
        e_t: (N, D) timestep embeddings, without the label's.
        weight: (M, D); bias: (M,). Half-precision weights are used as they are, in float32 arithmetic.
        noise_weight: (M, D); noise: (N, M) standard normal.

    Returns:
        (N, M) probabilities, float32 (float64 for a float64 model).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(device_type=e_t.device.type, enabled=False):
        e_t = F.silu(e_t.to(dtype))
        logits = F.linear(e_t, weight.to(dtype), bias.to(dtype))
        if noise is not None:
            logits = logits + noise.to(dtype) * F.softplus(F.linear(e_t, noise_weight.to(dtype)))
        return torch.softmax(logits, dim=-1)


def top_k_map(probs: Tensor, k: int) -> Tensor:
    """1 where an expert is among the k most probable of its row, else 0: (N, M), exactly k ones a row."""
    chosen = probs.topk(k, dim=-1).indices
    return torch.zeros_like(probs).scatter(-1, chosen, 1.0)


def top_k_gates(probs: Tensor, k: int) -> Tensor:
    """The k largest probabilities of each row as they are, not renormalised; zero elsewhere: (N, M)."""
    return probs * top_k_map(probs.detach(), k)
