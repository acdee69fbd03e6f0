"""Rectified flow: straight lines from data to noise, and the velocity along them.

    N = samples, C = latent channels
    x0, x_t, noise: (N, C, H, W);  t: (N,) float, from 0 (data) to 1 (noise);  model_output: (N, C or 2C, H, W)

Sources: Liu et al. 2022 (arXiv 2209.03003); Esser et al. 2024 (arXiv 2403.03206), whose logit-normal times
`switchdit.data.training_batches` draws. The variant is that of Diff-MoE, whose transformer learns no variance but may
have the channels for one.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from switchdit.diffusion.gaussian import arithmetic_dtype
from switchdit.errors import UserError

Time = TypeVar("Time", float, Tensor)


class RectifiedFlow:
    """The process x_t = (1 - t) x0 + t noise; used like a `GaussianDiffusion` in training.

    Args:
        num_timesteps: T, of a model made for timesteps 0 .. T: the unit of whatever is counted by timestep.
        time_scale: what t is multiplied with before a model is told. The sinusoids of the timestep embedding are made
            for 0 .. 1000. Diff-MoE's authors give them t from 0 to 1, on which nearly all are constant: 1.0 does as
            they do, and is what their published weights need.
    """

    def __init__(self, num_timesteps: int = 1000, time_scale: float = 1000.0):
        if not time_scale > 0:
            raise UserError(f"time_scale is {time_scale}; it must be above 0")
        self.num_timesteps, self.time_scale = num_timesteps, time_scale

    def interpolate(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t on the line from ``x0`` to ``noise`` (Liu et al. Eq. 1, with the ends exchanged): (N, C, H, W)."""
        t = t.to(arithmetic_dtype(x0)).view(-1, *[1] * (x0.ndim - 1))
        return (1 - t) * x0 + t * noise

    def model_time(self, t: Time) -> Time:
        """What a model is told of a time ``t``, one or (N,): ``t * time_scale``."""
        return t * self.time_scale

    def losses(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The loss per sample, under the names of `noise_losses`, which has the same arguments.

        Computed in float32 whatever the type of ``model_output`` (in float64 if x_t is float64).

        Returns:
            ``mse``: (N,), squared error of the velocity ``noise - x0``, mean over C, H, W (Liu et al. Eq. 1). Channels
                of the output beyond the first C are not used.
            ``vlb``: (N,) zeros.
        """
        channels = x_t.shape[1]
        if model_output.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"model output has {model_output.shape[1]} channels for {channels} of x_t")
        velocity = model_output[:, :channels].to(arithmetic_dtype(x_t))
        mse = (noise - x0 - velocity).square().flatten(1).mean(1)
        return {"mse": mse, "vlb": torch.zeros_like(mse)}
