"""Images from averaged weights: the model without ranks, guidance, sampler, decoder beside it.

N = images, C = latent channels, h = latent size, H = image size
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
def sample_latents(
    model: nn.Module,
    process: GaussianDiffusion | RectifiedFlow,
    labels: Tensor,
    indices: list[int],
    options: SampleConfig,
    seed: int,
    bounded: bool,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample. Predictions of ``bounded`` latents (pixels) are limited to -1 .. 1, but for rectified flow.

    Args:
        process: with its full schedule, which is respaced to ``options.num_steps``.
        labels: (N,) int64; indices: which images of the whole set these are: image i depends on (seed, i) alone.
        tick: called after every sampling step.

    Returns:
        (N, C, h, h) float32, on the model's device.
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
    start = noise()
    if flow:
        steps = euler_steps(denoise, process, start, options.num_steps)
    elif options.sampler == "ddim":
        steps = ddim_steps(denoise, process.respaced(options.num_steps), start, noise, bounded, eta=options.eta)
    else:
        steps = ddpm_steps(denoise, process.respaced(options.num_steps), start, noise, bounded)
    latents = start
    for step in steps:
        latents = step.x
        tick()
    return latents


class DecoderBeside:
    """Decodes latents on a thread of its own, on a GPU in a stream of its own, while the next ones are sampled.

        with DecoderBeside(autoencoder) as decode:
            for ...:
                decode(latents, keep)  # calls keep(images), (N, H, W, 3) uint8; all have been kept at the end

    One batch at a time: a call waits for the one before, and raises what went wrong there.
    """

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self.pending: Future | None = None
        self.stream: torch.cuda.Stream | None = None  # one for all batches: the allocator keeps memory by stream

    def __enter__(self) -> DecoderBeside:
        return self

    def __exit__(self, problem: type[BaseException] | None, *_) -> None:
        self.worker.shutdown(cancel_futures=problem is not None)
        if problem is None:
            self._finish()

    def __call__(self, latents: Tensor, keep: Callable[[np.ndarray], None]) -> None:
        self._finish()
        sampled = torch.cuda.current_stream(latents.device).record_event() if latents.is_cuda else None
        self.pending = self.worker.submit(self._decode, latents, sampled, keep)

    def _finish(self) -> None:
        if self.pending:
            self.pending.result()

    @torch.no_grad()
    def _decode(self, latents: Tensor, sampled: torch.cuda.Event | None, keep: Callable[[np.ndarray], None]) -> None:
        if sampled is None:
            keep(self.autoencoder.decode(latents).numpy())
            return
        self.stream = self.stream or torch.cuda.Stream(latents.device)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(sampled)
            latents.record_stream(self.stream)
            keep(self.autoencoder.decode(latents).cpu().numpy())


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Label of each image: all classes in turn, so that every class has its share."""
    return np.arange(num_images, dtype=np.int64) % num_classes


def image_blocks(num_images: int, max_size: int, world_size: int = 1) -> np.ndarray:
    """Which images are made in one call: (blocks, size), all of one size, so that a compiled model is compiled once.

    Each process takes as many blocks as another, or one less. The size is the least that needs no more of them than
    ``max_size`` does; the last block goes beyond ``num_images``, and what is made there is dropped.
    """
    rounds = math.ceil(num_images / (world_size * max_size))
    size = math.ceil(num_images / (world_size * rounds))
    blocks = math.ceil(num_images / size)
    return np.arange(blocks * size).reshape(blocks, size)


def cpu_block_size(num_images: int) -> int:
    """For 16 processes to have work, or 16 images, from where on a call costs on a CPU what its images do."""
    return max(1, min(16, num_images // 16))


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """(N, H, W, 3) images, row by row, on white: uint8 picture. N must be a multiple of ``columns``."""
    n, height, width, _ = images.shape
    rows = n // columns
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        picture[top : top + height, left : left + width] = image
    return picture


def class_rows(labels: np.ndarray, max_rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Which images make a grid with one row for each of the first ``max_rows`` classes, and its number of columns.

    That is ``columns``, or as many images as each of these classes has.
    """
    classes = np.unique(labels)[:max_rows]
    columns = min([columns, *(int((labels == c).sum()) for c in classes)])
    return np.concatenate([np.flatnonzero(labels == c)[:columns] for c in classes]), columns


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
    autoencoder = load_autoencoder(config.data.vae, device)
    indices, options, seed = list(range(len(labels))), config.sample, config.train.seed
    y = torch.from_numpy(labels)
    latents = sample_latents(averaged, process, y, indices, options, seed, autoencoder.bounded, tick)
    return image_grid(autoencoder.decode(latents).cpu().numpy(), columns=4)
