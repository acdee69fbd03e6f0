"""Images from averaged weights: the model without ranks, guidance, sampler, decoder.

N = images, C = latent channels, h = latent size, H = image size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from switchdit.config import Config, SampleConfig
from switchdit.data.autoencoder import Autoencoder, load_autoencoder
from switchdit.diffusion.gaussian import GaussianDiffusion
from switchdit.diffusion.rectified_flow import RectifiedFlow
from switchdit.diffusion.samplers import PerImageNoise, ddim_steps, ddpm_steps, euler_steps, guided
from switchdit.engine.global_state import load_global_state_dict
from switchdit.errors import UserError
from switchdit.models import build_model


def build_averaged_model(
    model: dict[str, Any], weights: dict[str, Tensor], device: torch.device, dtype: str = "float32"
) -> nn.Module:
    """The model of a checkpoint's ``state.json`` on one device, all experts local, in evaluation mode.

    Args:
        model: ``name`` and fields.
        weights: experts under global ids, as `Ema.state_dict` returns them.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """
    built = build_model(**model)
    load_global_state_dict(built, weights, "the averaged weights")
    return built.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def check_sampling(options: SampleConfig, in_channels: int, num_timesteps: int, has_null_label: bool) -> None:
    """Raise `UserError` if guidance is asked of a model without a null label, or more channels or steps than it has."""
    if options.cfg_scale != 1.0 and not has_null_label:
        raise UserError(
            f"sample.cfg_scale is {options.cfg_scale}, but the model has no null label (label dropout is 0); "
            "it must be 1.0"
        )
    if (options.guided_channels or 1) > in_channels:
        raise UserError(f"sample.guided_channels is {options.guided_channels}, but latents have {in_channels} channels")
    if options.guidance_interval and options.guidance_interval[1] > num_timesteps:
        raise UserError(
            f"sample.guidance_interval is {options.guidance_interval}, but the model has {num_timesteps} timesteps"
        )
    if options.num_steps > num_timesteps:
        raise UserError(f"sample.num_steps is {options.num_steps}, but the model has {num_timesteps} timesteps")


@torch.no_grad()
def generate(
    model: nn.Module,
    process: GaussianDiffusion | RectifiedFlow,
    autoencoder: Autoencoder,
    labels: Tensor,
    indices: list[int],
    options: SampleConfig,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Sample and decode. Predictions of bounded latents (pixels) are limited to -1 .. 1, but for rectified flow.

    Args:
        process: with its full schedule, which is respaced to ``options.num_steps``.
        labels: (N,) int64; indices: which images of the whole set these are: image i depends on (seed, i) alone.
        tick: called after every sampling step.

    Returns:
        (N, H, W, 3) uint8.
    """
    device = next(model.parameters()).device
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = PerImageNoise(seed, indices, shape, device)
    flow = isinstance(process, RectifiedFlow)
    interval = options.guidance_interval
    if interval and flow:  # from timesteps to what the model is told
        interval = [process.model_time(t / process.num_timesteps) for t in interval]
    guidance = (options.cfg_scale, options.guided_channels, interval)
    denoise = guided(model, labels.to(device), model.null_label, *guidance)
    start, clip = noise(), autoencoder.bounded
    if flow:
        steps = euler_steps(denoise, process, start, options.num_steps)
    elif options.sampler == "ddim":
        steps = ddim_steps(denoise, process.respaced(options.num_steps), start, noise, clip, eta=options.eta)
    else:
        steps = ddpm_steps(denoise, process.respaced(options.num_steps), start, noise, clip)
    latents = start
    for step in steps:
        latents = step.x
        tick()
    return autoencoder.decode(latents).cpu().numpy()


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Label of each image: all classes in turn, so that every class has its share."""
    return np.arange(num_images, dtype=np.int64) % num_classes


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """(N, H, W, 3) images, row by row, on white: uint8 picture. N must be a multiple of ``columns``."""
    n, height, width, _ = images.shape
    rows = n // columns
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        picture[top : top + height, left : left + width] = image
    return picture


def class_rows(images: np.ndarray, labels: np.ndarray, max_rows: int, columns: int) -> np.ndarray:
    """A grid with one row for each of the first ``max_rows`` classes, ``columns`` images or as many as each has."""
    classes = np.unique(labels)[:max_rows]
    columns = min([columns, *(int((labels == c).sum()) for c in classes)])
    chosen = np.concatenate([np.flatnonzero(labels == c)[:columns] for c in classes])
    return image_grid(images[chosen], columns)


def sample_grid(
    config: Config,
    model: dict[str, Any],
    weights: dict[str, Tensor],
    process: GaussianDiffusion | RectifiedFlow,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The picture that monitors show: four images of each of the first ``monitor.sample_classes`` classes.

    ``tick`` is called after every sampling step.
    """
    averaged = build_averaged_model(model, weights, device, config.sample.dtype)
    labels = np.repeat(np.arange(min(averaged.num_classes, max(1, config.monitor.sample_classes))), 4)
    images = generate(
        averaged,
        process,
        load_autoencoder(config.data.vae, device),
        torch.from_numpy(labels),
        list(range(len(labels))),
        config.sample,
        config.train.seed,
        tick,
    )
    return image_grid(images, columns=4)
