"""The diffusion prior loss: neighbouring timesteps are made to share experts (Switch-DiT, Sec. 4.2, Eq. 7 to 11).

    T = timesteps, B = blocks, M = experts, k = top-k, C = B * M columns (experts of all blocks side by side)

The target is DTR's task mask (arXiv 2310.07138) with alpha = 4: every timestep owns B*k of C columns, a window that
slides from the first to the last. Which column of the gates stands for which column of the target is found by
bipartite matching of the binary maps, over all T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from switchdit.errors import UserError
from switchdit.random_streams import random_stream

ALPHA = 4  # of DTR's mask: how late the window starts to move
EPSILON = 1e-6  # inside the logarithms, as in the authors' code


def prior_mask(
    num_blocks: int, num_experts: int, top_k: int, num_timesteps: int = 1000, variant: str = "code"
) -> Tensor:
    """Which columns each timestep should use: (T, C) float32 of 0 and 1.

    Args:
        variant: ``"code"``: the authors' table, B*k ones in each row, from which the published numbers come.
            ``"paper"``: Eq. 7 to the letter, which has B*k + 1 ones in some rows (12 of 1000 for B=12, M=3, k=2).
            ``"random"``: B*k columns drawn for every timestep for itself, the same in every run: the ablation in
            which neighbours have nothing in common.
    """
    start_of_last = num_blocks * (num_experts - top_k)
    width = num_blocks * top_k
    column = torch.arange(num_blocks * num_experts)
    if variant == "code":
        # float32 and half-to-even: what the published table was computed in
        start = torch.round(torch.linspace(0, 1, num_timesteps) ** ALPHA * start_of_last).long()
        end = start + width
    elif variant == "paper":
        t = torch.arange(1, num_timesteps + 1, dtype=torch.float64)
        start = torch.round(start_of_last * ((t - 1) / num_timesteps) ** ALPHA).long()
        end = torch.round(start_of_last * (t / num_timesteps) ** ALPHA).long() + width
    elif variant == "random":
        draw = random_stream(0, "random prior", num_timesteps).random((num_timesteps, len(column)))
        return torch.from_numpy((draw.argsort(axis=1).argsort(axis=1) < width).astype(np.float32))
    else:
        raise UserError(f"prior variant '{variant}' is unknown; valid are: code, paper, random")
    return ((column >= start[:, None]) & (column < end[:, None])).float()


def matching_cost(task_expert_map: Tensor, prior: Tensor) -> Tensor:
    """``C[i, j] = sum_t |map[t, i] - prior[t, j]|`` (Eq. 9) for binary maps (T, C): (C, C), whole numbers.

    ``|a - b| = a + b - 2ab`` for a, b in {0, 1}, so that one matrix product gives it.
    """
    return task_expert_map.sum(0)[:, None] + prior.sum(0)[None, :] - 2 * task_expert_map.T @ prior


def match_columns(task_expert_map: Tensor, prior: Tensor, seed: int = 0, step: int = 0) -> Tensor:
    """The prior's column for each column of the gates, at the lowest total cost (Eq. 9).

    Ties are common (all of a collapsed map), and loss and gradient depend on how they are broken. The authors break
    them by a random permutation of both sides, drawn on each rank for itself; here it is drawn from (seed, step), so
    that all ranks agree and a resumed run repeats it.

    Returns:
        (C,) int64 on the CPU, a permutation.
    """
    return _assign(matching_cost(task_expert_map.float(), prior.float()).cpu().numpy(), seed, step)


def begin_matching(
    worker: Executor, task_expert_map: Tensor, prior: Tensor, seed: int = 0, step: int = 0
) -> Callable[[], Tensor]:
    """As `match_columns`, of which only the cost is begun here, on the device; the rest is done by ``worker``, beside
    whatever the caller goes on with. What is returned waits for it, and gives the permutation in pinned memory if the
    maps are on a GPU."""
    cost = matching_cost(task_expert_map.float(), prior.float())
    if cost.device.type == "cpu":
        return worker.submit(lambda: _assign(cost.numpy(), seed, step)).result
    host = torch.empty(cost.shape, dtype=cost.dtype, pin_memory=True)
    host.copy_(cost, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    device = cost.device

    def assign() -> Tensor:
        with torch.cuda.device(device):  # a new thread's is the first
            copied.synchronize()  # this thread alone waits for the device
            return _assign(host.numpy(), seed, step).pin_memory()

    return worker.submit(assign).result


def _assign(cost: np.ndarray, seed: int, step: int) -> Tensor:
    draw = random_stream(seed, "prior matching", step)
    rows, columns = draw.permutation(len(cost)), draw.permutation(len(cost))
    matched_rows, matched_columns = linear_sum_assignment(cost[rows][:, columns])
    assignment = np.empty(len(cost), dtype=np.int64)
    assignment[rows[matched_rows]] = columns[matched_columns]
    return torch.from_numpy(assignment)


def diffusion_prior_loss(probs: Tensor, t: Tensor, prior: Tensor, assignment: Tensor, num_blocks: int) -> Tensor:
    """Jensen-Shannon divergence between gate probabilities and matched prior, in nats (Eq. 10, 11).

    Args:
        probs: (N, C) gate probabilities, the softmax of each block side by side; differentiable.
        t: (N,) int64 timesteps.
        prior: (T, C) from `prior_mask`; assignment: (C,) from `match_columns`.
        num_blocks: B; the probabilities of a sample sum to it.

    Returns:
        Scalar float32 (float64 for float64 probabilities): mean over samples of half the sum of the two
        Kullback-Leibler terms.
    """
    p = probs.to(torch.promote_types(probs.dtype, torch.float32)) / num_blocks
    q = prior[t][:, assignment].to(p.dtype)
    q = q / q.sum(-1, keepdim=True)
    log_middle = ((p + q) / 2 + EPSILON).log()
    kl_p = (p * ((p + EPSILON).log() - log_middle)).sum(-1)
    kl_q = (q * ((q + EPSILON).log() - log_middle)).sum(-1)
    return (kl_p + kl_q).mean() / 2
