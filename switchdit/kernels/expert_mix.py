"""The mixture of linear experts, gated per sample, and how it multiplies a block's input.

    N = samples, L = tokens of a sample, D = width, M = experts

All tokens of a sample share its timestep and hence its gates, and the experts are linear, so that the mixture is
one matrix per sample, exactly::

    sum_j g_j (z W_j + b_j)  =  z (sum_j g_j W_j) + sum_j g_j b_j

which costs 1/k of the arithmetic of k separate products per token, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_mixture(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
    """``sum_j g_nj (z_n W_j + b_j)``, with merged matrices.

    Args:
        z: (N, L, D). N may be 0: the experts then get zero gradients rather than none.
        weight: (M, D, D), applied from the right.
        bias: (M, D).
        gates: (N, M), zero where an expert is not chosen.

    Returns:
        (N, L, D) in the type of ``z``.
    """
    gates = gates.to(weight.dtype)
    merged_weight = (gates @ weight.flatten(1)).unflatten(1, weight.shape[1:])  # (N, D, D)
    merged_bias = gates @ bias  # (N, D)
    return torch.baddbmm(merged_bias.unsqueeze(1).to(z.dtype), z, merged_weight.to(z.dtype))


def linear_mixture_reference(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
    """`linear_mixture` as the paper writes it, one product per expert; what the merged form is tested against."""
    out = torch.zeros_like(z)
    for j in range(weight.shape[0]):
        out = out + gates[:, j, None, None].to(z.dtype) * (z @ weight[j] + bias[j])
    return out
