"""From noise to images: DDPM, DDIM, Euler steps along a flow, classifier-free guidance, noise that belongs to an image.

    N = samples, C = latent channels, S = steps of the (respaced) process, latents (N, C, H, W)
    abar_i = cumulative product of 1 - beta at step i

A sampler calls ``denoise(x, t) -> (N, 2C or C, H, W)`` with what a model was trained to be told, whatever the spacing:
a number that all rows share, the ORIGINAL timestep (int) or a flow's `model_time` (float). It knows nothing of models
or labels, and draws no random numbers of its own: ``noise(i)`` gives those of loop iteration i (0 is the noisiest).
The last step adds none and does not call it.

Arithmetic is float32 (float64 if x_T is), also around a bfloat16 model. No step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchdit.diffusion.gaussian import GaussianDiffusion, arithmetic_dtype
from switchdit.diffusion.rectified_flow import RectifiedFlow
from switchdit.errors import UserError

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]  # such as functools.partial(switchdit.progress.progress, desc=...)


class SamplerStep(NamedTuple):
    """What one iteration leaves: the timestep that it told the model, the new x, and the x0 it foresaw."""

    timestep: float
    x: Tensor
    x0: Tensor


def ddpm_sample(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    noise: Noise,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The last x of `ddpm_steps`: (N, C, H, W)."""
    return _last(ddpm_steps(denoise, diffusion, x_T, noise, clip_denoised, progress))


@torch.no_grad()
def ddpm_steps(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    noise: Noise,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Iterator[SamplerStep]:
    """Ancestral sampling, one step at a time (Ho et al. 2020, Alg. 2; variance as in `GaussianDiffusion.reverse_step`).

    Args:
        x_T: (N, C, H, W) standard normal.
        noise: iteration -> (N, C, H, W) standard normal.
        clip_denoised: limit each predicted x0 to -1 .. 1: for pixels, not for latents.
        progress: wraps the sequence of steps, to show them.
    """
    x = x_T
    for iteration, (index, t) in enumerate(_descending(diffusion, x_T, progress)):
        timestep = int(diffusion.timestep_map[index])
        step = diffusion.reverse_step(denoise(x, timestep), x, t, clip_denoised)
        x = step.mean
        if index > 0:
            x = x + torch.exp(0.5 * step.log_variance) * noise(iteration)
        yield SamplerStep(timestep, x, step.x0)


def ddim_sample(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    noise: Noise | None = None,
    clip_denoised: bool = False,
    progress: Progress | None = None,
    eta: float = 0.0,
) -> Tensor:
    """The last x of `ddim_steps`: (N, C, H, W)."""
    return _last(ddim_steps(denoise, diffusion, x_T, noise, clip_denoised, progress, eta))


@torch.no_grad()
def ddim_steps(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    noise: Noise | None = None,
    clip_denoised: bool = False,
    progress: Progress | None = None,
    eta: float = 0.0,
) -> Iterator[SamplerStep]:
    """DDIM, one step at a time (Song et al. 2021, arXiv 2010.02502, Eq. 12 and 16). Learned variance is not used.

    Args:
        eta: 0 is deterministic and calls no ``noise``, which may then be None; 1 has the posterior's variance.
        others: as in `ddpm_steps`.
    """
    if eta and noise is None:
        raise ValueError(f"DDIM with eta {eta} needs noise")
    x, channels = x_T, x_T.shape[1]
    for iteration, (index, t) in enumerate(_descending(diffusion, x_T, progress)):
        timestep = int(diffusion.timestep_map[index])
        eps = denoise(x, timestep)[:, :channels].to(arithmetic_dtype(x))
        x0 = diffusion.predict_x0(x, t, eps)
        # the whole batch shares the step: coefficients are host numbers in float64
        abar, abar_prev = float(diffusion.alphas_cumprod[index]), float(diffusion.alphas_cumprod_prev[index])
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)  # the noise that leads from the clipped x0 to x
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        x = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noise(iteration)
        yield SamplerStep(timestep, x, x0)


def euler_sample(
    velocity: Denoise, flow: RectifiedFlow, x_T: Tensor, num_steps: int, progress: Progress | None = None
) -> Tensor:
    """The last x of `euler_steps`: (N, C, H, W)."""
    return _last(euler_steps(velocity, flow, x_T, num_steps, progress))


@torch.no_grad()
def euler_steps(
    velocity: Denoise, flow: RectifiedFlow, x_T: Tensor, num_steps: int, progress: Progress | None = None
) -> Iterator[SamplerStep]:
    """Euler's method from noise at t = 1 to data at t = 0, in equal steps (Liu et al. 2022, Sec. 2.1).

    Each step's ``x0`` is where its velocity leads if followed to the end. The first C channels that ``velocity``
    returns are used.

    Args:
        x_T: (N, C, H, W) standard normal.
        progress: wraps the sequence of steps, to show them.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; it must be at least 1")
    x, channels = x_T, x_T.shape[1]
    remaining: Iterable[int] = range(num_steps, 0, -1)
    for left in progress(remaining) if progress else remaining:
        t = left / num_steps
        timestep = flow.model_time(t)
        v = velocity(x, timestep)[:, :channels].to(arithmetic_dtype(x))
        x0 = x - t * v
        x = x - v / num_steps
        yield SamplerStep(timestep, x, x0)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_label: int,
    cfg_scale: float,
    guided_channels: int | None = None,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) of ``model(x, t, y)``, as a ``denoise``.

    The model gets the timestep that all rows share as t of shape (1,); (N,) or (2N,) only where they differ.
    One forward of 2N rows, conditional first. Prediction = uncond + cfg_scale * (cond - uncond) on the first
    ``guided_channels`` channels of x; all others, variance included, are the conditional half's. A scale of 1 is the
    plain model: one forward of N rows. The result also takes timesteps (N,), one for each row.

    Args:
        y: (N,) int64 labels, on the device of x.
        null_label: the row of the label table that stands for "no label".
        guided_channels: None guides all C channels, as Switch-DiT's published samples do. DiT's do with 3 of the 4
            latent channels, "for exact reproducibility" of theirs: pass 3 to compare with DiT.
        interval: (low, high), in what the model is told, both inclusive, in which to guide; outside them the result is
            the conditional prediction (Kynkäänniemi et al. 2024, arXiv 2404.07724), by one forward of N rows. Of
            timesteps (N,) it takes 2N wherever they are: to skip them would mean to wait for the device.
    """
    if guided_channels is not None and guided_channels < 1:
        raise UserError(f"guided_channels is {guided_channels}; it must be at least 1 (or none given: all channels)")
    low, high = interval or (-math.inf, math.inf)
    both_y = torch.cat([y, torch.full_like(y, null_label)]) if cfg_scale != 1 else None

    def denoise(x: Tensor, t: float | Tensor) -> Tensor:
        n, channels = x.shape[:2]
        if y.shape != (n,):
            raise ValueError(f"guidance was made for labels of shape {tuple(y.shape)}, x has {n} rows")
        first = channels if guided_channels is None else guided_channels
        if first > channels:
            raise UserError(f"guided_channels is {first}, but x has {channels} channels")
        per_row = isinstance(t, Tensor)
        rows = t if per_row else torch.full((1,), t, device=x.device)
        if cfg_scale == 1 or not (per_row or low <= t <= high):
            return model(x, rows, y)
        both_t = torch.cat([t, t]) if per_row else rows
        out = model(torch.cat([x, x]), both_t, both_y).to(arithmetic_dtype(x))  # (2N, 2C or C, H, W)
        conditional, unconditional = out[:n], out[n:, :first]
        prediction = unconditional + cfg_scale * (conditional[:, :first] - unconditional)
        if per_row and interval is not None:
            inside = ((t >= low) & (t <= high)).view(-1, *[1] * (x.ndim - 1))
            prediction = torch.where(inside, prediction, conditional[:, :first])
        return torch.cat([prediction, conditional[:, first:]], 1)

    return denoise


class PerImageNoise:
    """Standard normal noise that belongs to an image, not to the batch or process that happens to draw it.

    Each call returns the next (N, *shape) float32; row n comes from a generator of its own, which depends on
    (seed, indices[n]) and the kind of device. So a set of images does not depend on batch size or number of processes.

        noise = PerImageNoise(seed=0, indices=[7, 8, 9], shape=(4, 32, 32), device="cuda")
        images = ddpm_sample(denoise, diffusion, x_T=noise(), noise=noise)

    Args:
        seed: of the set of images, 0 .. 2^32 - 1.
        indices: of the images within the set, 0 .. 2^32 - 1 each.
        shape: of one image, (C, H, W).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(image_seed(seed, int(i))) for i in indices]

    def __call__(self, iteration: int | None = None) -> Tensor:
        """The next (N, *shape). ``iteration`` is what samplers pass; the order of the calls is what counts."""
        noise = torch.empty(len(self.generators), *self.shape, device=self.device)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(self.shape, generator=generator, device=self.device, out=row)
        return noise


def image_seed(seed: int, index: int) -> int:
    """A 64-bit generator seed for image ``index`` of set ``seed``, both 0 .. 2^32 - 1.

    High word: seed. Low word: index, its upper half XORed with the seed's lower half. Different (seed, index) give
    different numbers. PyTorch's CPU generator reads the low word only: there, images of one set always differ, and
    images of different sets do while seed and index stay below 65,536.
    """
    for name, value in (("seed", seed), ("image index", index)):
        if not 0 <= value < 2**32:
            raise UserError(f"{name} is {value}; it must be from 0 to {2**32 - 1}")
    return seed << 32 | (index ^ (seed << 16) & 0xFFFFFFFF)


def _descending(diffusion: GaussianDiffusion, x_T: Tensor, progress: Progress | None) -> Iterator[tuple[int, Tensor]]:
    """(index, t) from the noisiest step to the first; t (N,) int64 holds index, filled on the device of x_T."""
    indices: Iterable[int] = range(diffusion.num_timesteps - 1, -1, -1)
    for index in progress(indices) if progress else indices:
        yield index, torch.full((len(x_T),), index, dtype=torch.int64, device=x_T.device)


def _last(steps: Iterator[SamplerStep]) -> Tensor:
    for step in steps:  # noqa: B007
        pass
    return step.x
