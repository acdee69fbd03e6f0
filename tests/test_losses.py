"""The denoising loss against the published code's numbers and against definitions computed another way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
from switchdit.diffusion.losses import (
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    noise_losses,
    variational_bound,
)

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "gaussian_diffusion.npz"))
schedules = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def process(schedule: str, num_timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas(schedule, num_timesteps))


def golden(key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"loss/{key}"]).to(dtype)


def case(schedule: str, dtype: torch.dtype = torch.float32):
    """(diffusion, model output, x0, x_t, t, noise): eight samples, t from 0 to 999."""
    diffusion = process(schedule)
    x0, noise, t = golden("x_start", dtype), golden("noise", dtype), golden("t")
    output = golden(f"{schedule}/model_output", dtype).requires_grad_()
    return diffusion, output, x0, diffusion.q_sample(x0, t, noise), t, noise


@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_losses(schedule, dtype):
    """float32 was equal to the last bit on the machine (x86) that made the numbers, gradients included.

    Elsewhere, and in float64, what is left is the rounding of the published float32 numbers: 6e-6 of the bound, whose
    terms cancel, 1.3e-7 of the squared error, 9e-7 of a sample's gradient.
    """
    diffusion, output, x0, x_t, t, noise = case(schedule, dtype)
    published = f"{schedule}/constant"
    torch.testing.assert_close(x_t, golden(f"{published}/x_t", dtype), rtol=0, atol=3e-7)
    # at t = 999 the bound holds sqrt(1 / abar), up to 2e4, times the error of x_t: take the x_t that they had
    losses = noise_losses(diffusion, output, x0, golden(f"{published}/x_t", dtype), t, noise)
    torch.testing.assert_close(losses["mse"], golden(f"{published}/mse", dtype), rtol=5e-7, atol=0)
    torch.testing.assert_close(losses["vlb"], golden(f"{published}/vb", dtype), rtol=1e-5, atol=0)
    total = losses["mse"] + losses["vlb"]
    torch.testing.assert_close(total, golden(f"{published}/loss", dtype), rtol=1e-6, atol=0)
    total.mean().backward()
    error = (output.grad - golden(f"{schedule}/grad_model_output", dtype)).flatten(1).norm(dim=1)
    assert (error / output.grad.flatten(1).norm(dim=1)).max() < 2e-6


@schedules
def test_the_bound_trains_the_variance_alone(schedule):
    diffusion, output, x0, x_t, t, noise = case(schedule)
    noise_losses(diffusion, output, x0, x_t, t, noise)["vlb"].sum().backward()
    assert (output.grad[:, :4] == 0).all()
    assert (output.grad[:, 4:].flatten(1).abs().amax(1) > 0).all()


def test_the_mse_trains_the_noise_alone():
    diffusion, output, x0, x_t, t, noise = case("cosine")
    noise_losses(diffusion, output, x0, x_t, t, noise)["mse"].sum().backward()
    torch.testing.assert_close(output.grad[:, :4], 2 * (output[:, :4] - noise) / noise[0].numel())
    assert (output.grad[:, 4:] == 0).all()


def test_without_learned_sigma():
    diffusion, output, x0, x_t, t, noise = case("linear")
    losses = noise_losses(diffusion, output[:, :4], x0, x_t, t, noise)
    torch.testing.assert_close(losses["mse"], noise_losses(diffusion, output, x0, x_t, t, noise)["mse"])
    assert torch.equal(losses["vlb"], torch.zeros(8))


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_bfloat16_output_is_computed_in_float32(inputs):
    diffusion, output, *tensors = case("cosine")
    x0, x_t, t, noise = (x if x.dtype == torch.int64 else x.to(inputs) for x in tensors)
    narrow = output.detach().bfloat16().requires_grad_()
    losses = noise_losses(diffusion, narrow, x0, x_t, t, noise)
    expected = noise_losses(diffusion, narrow.float(), x0.float(), x_t.float(), t, noise.float())
    for name in ("mse", "vlb"):
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], expected[name])
    sum(losses.values()).sum().backward()
    assert narrow.grad.dtype == torch.bfloat16
    assert narrow.grad.isfinite().all()


@schedules
def test_a_perfect_network_has_no_divergence(schedule):
    diffusion, _, x0, x_t, t, noise = case(schedule, torch.float64)
    perfect = torch.cat([noise, -torch.ones_like(noise)], 1)
    losses = noise_losses(diffusion, perfect, x0, x_t, t, noise)
    assert (losses["mse"] == 0).all()
    assert losses["vlb"][t > 0].abs().max() < 1e-9


def test_scale_of_the_bound():
    """T / 1000 times bits per dimension."""
    diffusion = process("cosine", 200)
    _, output, x0, _, _, noise = case("cosine")
    t = torch.tensor([0, 1, 2, 50, 100, 150, 190, 199])
    x_t = diffusion.q_sample(x0, t, noise)
    bits = variational_bound(diffusion, output, x0, x_t, t)
    torch.testing.assert_close(noise_losses(diffusion, output, x0, x_t, t, noise)["vlb"], bits * 0.2)


def test_divergence_of_gaussians():
    draws = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean1, log_variance1, mean2, log_variance2 = draws
    expected = kl_divergence(Normal(mean1, torch.exp(log_variance1 / 2)), Normal(mean2, torch.exp(log_variance2 / 2)))
    torch.testing.assert_close(gaussian_kl(mean1, log_variance1, mean2, log_variance2), expected)


@pytest.mark.parametrize("scale", [0.002, 0.05, 0.7])
@pytest.mark.parametrize("mean", [-1.3, -0.99, 0.1234, 1.0])
def test_likelihood_is_the_mass_of_the_bin(mean, scale):
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_scale = torch.full_like(pixels, math.log(scale))
    mass = discretized_gaussian_log_likelihood(pixels, torch.full_like(pixels, mean), log_scale).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)  # the outermost bins reach to infinity

    edges = torch.cat([torch.tensor([-torch.inf]), (pixels[1:] + pixels[:-1]) / 2, torch.tensor([torch.inf])])
    exact = Normal(torch.tensor(mean, dtype=torch.float64), scale).cdf(edges).diff()
    assert (mass - exact).abs().max() < 4e-4  # twice the error of the approximate distribution function
