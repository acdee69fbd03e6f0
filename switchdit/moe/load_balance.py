"""The load-balance loss: experts are made to get equal shares of what is routed (Switch Transformer, Eq. 4 to 6).

    R = rows that are routed (tokens, or samples), E = experts, k = top-k

Over the rows of one process's micro-batch: with few of them the shares are far from what a whole batch has, so that the
loss, unlike the others, depends on how the batch is cut.
"""

from __future__ import annotations

from torch import Tensor


def load_balance_loss(probs: Tensor, chosen: Tensor) -> Tensor:
    """``E * sum_e f_e P_e``: 1 when all experts get equal shares, up to E / k when all rows choose the same.

    Args:
        probs: (R, E) gate probabilities of the rows; P_e is their mean. Differentiable.
        chosen: (R, E) of 0 and 1, k ones a row; f_e is the share of all choices that went to expert e.

    Returns:
        Scalar float32 (float64 for float64 probabilities).
    """
    share = chosen.detach().to(probs.dtype).sum(0) / chosen.detach().sum()
    return probs.shape[1] * (share * probs.mean(0)).sum()
