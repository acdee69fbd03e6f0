"""The loss of one denoising step, given what the network made of it.

    N = samples, C = latent channels, T = timesteps of the process
    x0, x_t, noise: (N, C, H, W);  t: (N,) int64;  model_output: (N, 2C, H, W), or (N, C, H, W) without learned sigma

Nothing here calls a model, averages over the batch or weighs terms against each other: the training loop does.
Sources: Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switchdit.diffusion.gaussian import GaussianDiffusion, arithmetic_dtype

PIXEL_STEP = 2 / 255  # of 8-bit pixels scaled to -1 .. 1


def noise_losses(
    diffusion: GaussianDiffusion, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """The two terms of L_hybrid (Nichol & Dhariwal Eq. 16), per sample; their sum is the denoising loss.

    Computed in float32 whatever the type of ``model_output`` (in float64 if x_t is float64).

    Returns:
        ``mse``: (N,), squared error of the predicted noise, mean over C, H, W (Ho et al. Eq. 14, which sums).
        ``vlb``: (N,), `variational_bound` times T / 1000. It trains the variance channels alone: the predicted noise
            enters without gradient (Sec. 3.1). The factor is the 0.001 of Eq. 16 times T, because one uniformly
            drawn t stands for the sum over all. Zeros if there are no variance channels.
    """
    channels = x_t.shape[1]
    model_output = model_output.to(arithmetic_dtype(x_t))
    eps, v = model_output[:, :channels], model_output[:, channels:]
    mse = (eps - noise).square().flatten(1).mean(1)
    if not v.shape[1]:
        return {"mse": mse, "vlb": torch.zeros_like(mse)}
    bound = variational_bound(diffusion, torch.cat([eps.detach(), v], 1), x0, x_t, t)
    return {"mse": mse, "vlb": bound * (diffusion.num_timesteps / 1000)}


def variational_bound(diffusion: GaussianDiffusion, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """L_{t-1} of the variational bound (Ho et al. Eq. 5) in bits per dimension: (N,).

    For t > 0 the divergence of the network's reverse step from the true posterior; for t = 0 the negative log
    likelihood of x0, read as 8-bit pixels even where it is a latent (as published code does).
    """
    true_mean, true_log_variance = diffusion.q_posterior(x0, x_t, t)
    step = diffusion.reverse_step(model_output, x_t, t)
    divergence = gaussian_kl(true_mean, true_log_variance, step.mean, step.log_variance)
    likelihood = discretized_gaussian_log_likelihood(x0, step.mean, step.log_variance / 2)
    first = (t == 0).view(-1, *[1] * (x_t.ndim - 1))
    return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(Normal(mean1, .) || Normal(mean2, .)) in nats, element by element."""
    # terms cancel for like Gaussians: added in this order, float32 rounds as in the published losses
    return 0.5 * (
        -1
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2).square() * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that Normal(mean, exp(log_scale)) gives to the 8-bit bin around x, in nats (Ho et al. Eq. 13).

    The lowest and highest bin of -1 .. 1 reach to infinity. Mass below 1e-12 counts as 1e-12, without gradient.
    """
    per_scale = torch.exp(-log_scale)
    below_upper = _normal_cdf((x - mean + PIXEL_STEP / 2) * per_scale)
    below_lower = _normal_cdf((x - mean - PIXEL_STEP / 2) * per_scale)
    in_first, in_last = x < -1 + 0.001, x > 1 - 0.001
    mass = torch.where(in_first, below_upper, torch.where(in_last, 1 - below_lower, below_upper - below_lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """Page's tanh approximation (Applied Statistics 26, 1977), error below 2e-4; published losses are made with it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
