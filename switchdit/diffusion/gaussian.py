"""Gaussian diffusion: noise schedules, the forward process, its posterior, and the learned reverse step.

    N = samples, C = latent channels, T = timesteps of this process, T0 = timesteps of the process it was respaced from
    x0, x_t, noise: (N, C, H, W);  t: (N,) int64, an index 0 .. T-1 into this process's own tables
    abar_t = prod_{s <= t} (1 - beta_s)

Tables are computed once in float64. What they are multiplied with is computed in float32, or in float64 if the
inputs are float64; bfloat16 and float16 inputs are promoted.

Sources: Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from switchdit.errors import UserError, nearest

SCHEDULES = ("linear", "cosine")
MAX_BETA = 0.999  # of the cosine schedule: keeps abar above zero


def make_betas(schedule: str, num_timesteps: int) -> np.ndarray:
    """The variances beta_t of the forward steps: (T,) float64.

    ``"linear"`` is Ho et al.'s 1e-4 to 0.02 for T = 1000; for other T the ends scale with 1000 / T, so that the
    process ends equally noisy. ``"cosine"`` is Nichol & Dhariwal Eq. 17, with beta at most 0.999.

    Raises:
        UserError: unknown schedule, or a T for which the linear schedule would leave (0, 1).
    """
    if num_timesteps < 1:
        raise UserError(f"num_timesteps is {num_timesteps}; it must be at least 1")
    if schedule == "linear":
        scale = 1000 / num_timesteps
        if 0.02 * scale >= 1:
            raise UserError(f"num_timesteps is {num_timesteps}; the linear schedule needs at least 21 (use cosine)")
        return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    if schedule == "cosine":
        f = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
        return np.array([min(1 - f[i + 1] / f[i], MAX_BETA) for i in range(num_timesteps)])
    raise UserError(f"noise schedule '{schedule}' is unknown{nearest(schedule, SCHEDULES)}")


def space_timesteps(num_timesteps: int, spec: int | str) -> np.ndarray:
    """Which of T timesteps a shorter process keeps: strictly increasing int64.

    Args:
        spec: ``250`` or ``"250"``: that many, evenly from the first to the last (rounded; 1 keeps only the first).
            ``"10,15,20"``: the timesteps are cut into as many equal sections as there are numbers (the first
            sections take what is left over), and each section keeps its number (Nichol & Dhariwal, Sec. 4).
            ``"ddim50"``: 0, s, 2s, ... with the smallest whole stride s that keeps 50 (Song et al. 2021, App. D.2).

    Raises:
        UserError: a spec that is none of these, or asks for more timesteps than there are.
    """
    text = str(spec).strip()
    if text.startswith("ddim"):
        count = _count(text[len("ddim") :], spec)
        stride = -(-num_timesteps // count)  # the smallest that keeps no more than count
        if -(-num_timesteps // stride) != count:
            raise UserError(f"timestep spacing '{spec}': no whole stride keeps {count} of {num_timesteps} timesteps")
        return np.arange(0, num_timesteps, stride, dtype=np.int64)

    counts = [_count(part, spec) for part in text.split(",")]
    size, left_over = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < left_over)
        if count > length:
            raise UserError(f"timestep spacing '{spec}': cannot keep {count} of a section of {length} timesteps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # a running sum, as published sampling code takes it: which side x.5 rounds to depends on the order of adding
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        kept.append(start + np.rint(offsets).astype(np.int64))
        start += length
    return np.concatenate(kept)


def _count(text: str, spec: int | str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) > 0):
        raise UserError(f"timestep spacing '{spec}' is not valid; examples are: 250, '10,15,20', 'ddim50'")
    return int(text)


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t) = Normal(mean, exp(log_variance)), and the x0 it was derived from; each (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class GaussianDiffusion:
    """The process with variances ``betas``: all that training and sampling need to know of it.

    Args:
        betas: (T,), each in (0, 1].
        timestep_map: (T,) int64, the timestep of the original process that each step stands for, which is what a
            model is told. None: the process is the original one, 0 .. T-1.

    Attributes (all (T,) float64, except where said):
        betas, alphas_cumprod (abar_t), alphas_cumprod_prev (abar_{t-1}, 1 at t = 0), posterior_variance, ...
        timestep_map: int64.
    """

    def __init__(self, betas: np.ndarray, timestep_map: np.ndarray | None = None):
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a non-empty vector with values in (0, 1], got shape {betas.shape}")
        self.betas = betas
        self.num_timesteps = len(betas)
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.array(timestep_map, dtype=np.int64)
        if self.timestep_map.shape != betas.shape:
            raise ValueError(f"timestep_map has shape {self.timestep_map.shape}, betas {betas.shape}")

        alphas = 1 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod = abar
        self.alphas_cumprod_prev = abar_prev
        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / abar - 1)
        self.snr = abar / (1 - abar)
        # Ho et al. Eq. 6, 7
        self.posterior_mean_coef1 = betas * np.sqrt(abar_prev) / (1 - abar)
        self.posterior_mean_coef2 = (1 - abar_prev) * np.sqrt(alphas) / (1 - abar)
        self.posterior_variance = betas * (1 - abar_prev) / (1 - abar)
        # The posterior of the first step is a point. Its logarithm is replaced by the second step's; a process of
        # one step has none, and takes beta's.
        second = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def respaced(self, spec: int | str) -> GaussianDiffusion:
        """The process that visits only the timesteps of `space_timesteps`; its abar are this one's at those.

        ``timestep_map`` of the result gives original timesteps, also when a respaced process is respaced again.
        """
        kept = space_timesteps(self.num_timesteps, spec)
        abar = self.alphas_cumprod[kept]
        return GaussianDiffusion(1 - abar / np.append(1.0, abar[:-1]), self.timestep_map[kept])

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x0) for a given standard normal ``noise`` (Ho et al. Eq. 4): (N, C, H, W)."""
        return self._at("sqrt_alphas_cumprod", t, x0) * x0 + self._at("sqrt_one_minus_alphas_cumprod", t, x0) * noise

    interpolate = q_sample  # the name that training calls, whatever the process

    def model_time(self, t: Tensor) -> Tensor:
        """What a model is told of the index ``t``: the timestep of the original process, (N,) int64."""
        return self._table("timestep_map", t.device, torch.int64)[t]

    def signal_to_noise(self, t: Tensor) -> Tensor:
        """abar_t / (1 - abar_t): (N,) float32."""
        return self._table("snr", t.device, torch.float32)[t]

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t-1} | x_t, x0) (Ho et al. Eq. 6, 7): its mean (N, C, H, W) and log variance (N, 1, 1, 1).

        The log variance is clipped: at t = 0, where the variance is zero, it is that of t = 1.
        """
        mean = self._at("posterior_mean_coef1", t, x0) * x0 + self._at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self._at("posterior_log_variance_clipped", t, x_t)

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x0 from which ``eps`` leads to ``x_t``: the inverse of `q_sample` (Ho et al. Eq. 15)."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def learned_range_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Between the posterior's log variance (v = -1) and log beta_t (v = 1): Nichol & Dhariwal Eq. 15.

        The network's ``v`` (N, C, H, W) is not bounded; values beyond -1 .. 1 extrapolate.
        """
        upper = (v + 1) / 2
        return upper * self._at("log_betas", t, v) + (1 - upper) * self._at("posterior_log_variance_clipped", t, v)

    def reverse_step(self, model_output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = False) -> ReverseStep:
        """p(x_{t-1} | x_t) as the network has it.

        Args:
            model_output: (N, 2C, H, W), noise and variance ``v``; or (N, C, H, W), noise alone, and then the variance
                is beta_t (Ho et al. Sec. 3.2; of their two choices the one that published samplers take).
            clip_denoised: limit the predicted x0 to -1 .. 1. For pixels; latents are not bounded.
        """
        channels = x_t.shape[1]
        if model_output.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"model output has {model_output.shape[1]} channels for {channels} of x_t")
        model_output = model_output.to(arithmetic_dtype(x_t))
        eps, v = model_output[:, :channels], model_output[:, channels:]
        x0 = self.predict_x0(x_t, t, eps)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean, _ = self.q_posterior(x0, x_t, t)
        if v.shape[1]:
            return ReverseStep(mean, self.learned_range_log_variance(v, t), x0)
        return ReverseStep(mean, self._at("log_betas", t, x_t).expand_as(mean), x0)

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """(T,) table, (N,) -> (N, 1, 1, 1) on the device of ``like``."""
        return self._table(table, like.device, arithmetic_dtype(like))[t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(T,) on ``device``; only the first use there copies it."""
        key = (name, device, dtype)
        if key not in self._on_device:
            with torch.inference_mode(False):  # a table first used while sampling must serve training as well
                self._on_device[key] = torch.tensor(getattr(self, name), device=device, dtype=dtype)
        return self._on_device[key]


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all narrower types."""
    return torch.promote_types(x.dtype, torch.float32)
