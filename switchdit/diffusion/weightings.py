"""How much each timestep counts: weights of the squared error, and learned weights of timestep clusters.

    N = samples, T = timesteps;  t: (N,) int64;  snr_t = abar_t / (1 - abar_t), the signal-to-noise ratio

Sources: Hang et al. 2023 (min-SNR, arXiv 2303.09556), Choi et al. 2022 (P2, arXiv 2204.00227), Go et al. 2023
(timestep clusters as tasks, arXiv 2306.00354), Kendall et al. 2018 (uncertainty weighting, arXiv 1705.07115).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchdit.diffusion.gaussian import GaussianDiffusion
from switchdit.errors import UserError, nearest

FIXED_WEIGHTINGS = ("constant", "min_snr", "p2")
NUM_CLUSTERS = 8


def loss_weights(
    name: str,
    diffusion: GaussianDiffusion,
    t: Tensor,
    *,
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """The weight of each sample's squared error of the noise; the variational bound is not weighted: (N,) float32.

    Args:
        name: ``"constant"``: 1. ``"min_snr"``: min(snr, gamma) / snr (Hang et al. Sec. 3.4, for predicted noise).
            ``"p2"``: 1 / (k + snr)^gamma (Choi et al. Sec. 3.3, relative to the plain loss). It weighs the sample that
            it belongs to: the code published with Switch-DiT gives it the shape (N, C, H, W), against a loss of (N,),
            so that it fails or, where the shapes happen to fit, multiplies mean weight by mean loss.

    Raises:
        UserError: unknown name.
    """
    if name == "constant":
        return torch.ones(t.shape, device=t.device)
    if name == "min_snr":
        return (min_snr_gamma / diffusion.signal_to_noise(t)).clamp(max=1)
    if name == "p2":
        return (p2_k + diffusion.signal_to_noise(t)) ** -p2_gamma
    raise UserError(f"loss weighting '{name}' is unknown{nearest(name, FIXED_WEIGHTINGS)}")


def cluster_of(t: Tensor, num_timesteps: int) -> Tensor:
    """Which of the equal ranges of timesteps each t belongs to, 0 .. 7: (N,) int64."""
    return t * NUM_CLUSTERS // num_timesteps


def cluster_bounds(cluster: int, num_timesteps: int) -> tuple[int, int]:
    """First timestep of a cluster and of the next one; sizes differ by one at most where 8 does not divide T."""
    return -(-cluster * num_timesteps // NUM_CLUSTERS), -(-(cluster + 1) * num_timesteps // NUM_CLUSTERS)


class UncertaintyWeighting:
    """A learned log-variance s for each of eight clusters of timesteps; every cluster counts as a task.

        L = mean_n 0.5 exp(-s_c(n)) loss_n + 0.5 sum_c s_c

    is Kendall et al.'s Eq. 7 with an eighth of each cluster's mean loss, if all clusters have as many samples; drawn by
    cluster they do, on average over the steps for any batch size. Written per sample, no sample is dropped where 8
    does not divide the batch (the published code drops them), and no process need hold all clusters.

    The gradient dL/ds_c = 0.5 - 0.5 exp(-s_c) sum_{n in c} loss_n / N follows from sums over the global batch, however
    it is cut. So s takes its own Adam step (Kingma & Ba 2015, Alg. 1; no decay) beside the model's optimizer, the same
    on every process.

        weighting.loss(per_sample_loss, t).backward()     # for each micro-batch
        weighting.step(torch.distributed.all_reduce)      # once per optimizer step

    Attributes:
        log_variances: s, (8,) float32.
    """

    BETAS, EPSILON = (0.9, 0.999), 1e-8

    def __init__(self, lr: float = 0.025, num_timesteps: int = 1000, device: torch.device | str = "cpu"):
        self.lr, self.num_timesteps = lr, num_timesteps
        self.log_variances = torch.zeros(NUM_CLUSTERS, device=device)
        self.steps = 0
        self._mean, self._square = torch.zeros_like(self.log_variances), torch.zeros_like(self.log_variances)
        # of the losses by cluster, and the number of samples; float64, so that the order of adding does not matter
        self._sums = torch.zeros(NUM_CLUSTERS + 1, dtype=torch.float64, device=device)

    def loss(self, per_sample_loss: Tensor, t: Tensor) -> Tensor:
        """L of a micro-batch, differentiable in ``per_sample_loss`` (N,): scalar. Takes note of it for `step`."""
        cluster = cluster_of(t, self.num_timesteps)
        member = cluster == torch.arange(NUM_CLUSTERS, device=t.device)[:, None]  # (8, N)
        self._sums[:NUM_CLUSTERS] += (member * per_sample_loss.detach().double()).sum(1)
        self._sums[NUM_CLUSTERS] += len(t)
        s = self.log_variances
        return (0.5 * torch.exp(-s)[cluster] * per_sample_loss).mean() + 0.5 * s.sum()

    def gradient(self) -> Tensor:
        """dL/ds of all that `loss` took note of since the last `step`: (8,) float32."""
        share = self._sums[:NUM_CLUSTERS] / self._sums[NUM_CLUSTERS]
        return (0.5 - 0.5 * torch.exp(-self.log_variances.double()) * share).float()

    def step(self, world_reduce: Callable[[Tensor], object]) -> None:
        """One step of s on the micro-batches since the last one.

        Args:
            world_reduce: adds a tensor up over all processes, in place.
        """
        world_reduce(self._sums)
        gradient = self.gradient()
        self._sums.zero_()
        self.steps += 1
        beta1, beta2 = self.BETAS
        self._mean.lerp_(gradient, 1 - beta1)
        self._square.lerp_(gradient.square(), 1 - beta2)
        mean, square = self._mean / (1 - beta1**self.steps), self._square / (1 - beta2**self.steps)
        self.log_variances.sub_(self.lr * mean / (square.sqrt() + self.EPSILON))

    def forget(self) -> None:
        """Leave out the micro-batches since the last step, of a step that was skipped."""
        self._sums.zero_()

    def state(self) -> dict[str, Any]:
        """What `restore` needs, in lists and numbers that JSON holds exactly."""
        return {
            "steps": self.steps,
            "log_variances": self.log_variances.tolist(),
            "adam_mean": self._mean.tolist(),
            "adam_square": self._square.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, between two steps.

        Raises:
            UserError: if ``state`` is not one.
        """
        tensors = {"log_variances": self.log_variances, "adam_mean": self._mean, "adam_square": self._square}
        if missing := {"steps", *tensors} - set(state):
            raise UserError(
                f"the checkpoint has no {', '.join(sorted(missing))} of uncertainty weighting: "
                "the run that wrote it was weighted otherwise"
            )
        for name, tensor in tensors.items():
            if (count := len(state[name])) != NUM_CLUSTERS:
                raise UserError(f"the checkpoint's {name} has {count} timestep clusters; there must be {NUM_CLUSTERS}")
            tensor.copy_(torch.tensor(state[name]))
        self.steps = state["steps"]
        self.forget()
