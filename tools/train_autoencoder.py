"""Train a small AutoencoderKL on a folder, tar or zip of images, for demos and tests; saved in diffusers' format.

    python tools/train_autoencoder.py --data DATA --out DIR [--image-size 32]

The defaults turn 32 x 32 pixels into latents of 8 x 8 x 4, and take about a minute on one core. Loss: L1 + MSE of the
reconstruction + a small KL term. The saved latents have mean 0 and the same standard deviation in every channel, and
``scaling_factor`` is one over it. Published autoencoders, such as stabilityai/sd-vae-ft-ema, need no training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

import numpy as np

from switchdit.data.autoencoder import WEIGHTS
from switchdit.data.image_pixels import read_all_images
from switchdit.data.image_source import list_images
from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import sha256_of, sync_directory, write_json
from switchdit.progress import progress

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

RECORD = "training.json"
LATENT_CHANNELS = 4
MEASURED = 512  # images at most, of which reconstructions are compared

# N = images, S = pixels of a side, C = latent channels


@dataclass(frozen=True)
class Settings:
    """All that decides the result beside the images."""

    image_size: int
    steps: int
    seed: int
    channels: tuple[int, ...]  # of the levels; each level but the last halves the image
    batch_size: int = 32
    learning_rate: float = 2e-3
    # Weighs the KL divergence per latent value. Ten times as much makes a channel collapse to noise; less leaves
    # latents that are less smooth and a decoder that takes less noise.
    kl_weight: float = 1e-3
    recipe: int = 1  # counts changes of the code that change the result


def build_model(settings: Settings) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    levels = len(settings.channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=settings.channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=math.gcd(8, *settings.channels),
        sample_size=settings.image_size,
        mid_block_add_attention=False,
    )


def as_batch(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, S, S, 3) -> float32 (N, 3, S, S) in [-1, 1]."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(images: np.ndarray, settings: Settings) -> AutoencoderKL:
    """Train on the CPU; the same images and settings give the same weights on any number of cores.

    One thread, since layers this small gain little from two and lose everything where cores are shared.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model = build_model(settings).to(memory_format=torch.channels_last)  # a third faster on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
    )
    order = np.random.default_rng(settings.seed)
    with progress(desc="training the autoencoder", total=settings.steps, unit="step") as bar:
        for _ in range(settings.steps):
            batch = as_batch(images[order.integers(len(images), size=settings.batch_size)])
            mirrored = torch.from_numpy(order.random(settings.batch_size) < 0.5)[:, None, None, None]
            batch = torch.where(mirrored, batch.flip(-1), batch)

            posterior = model.encode(batch).latent_dist
            error = model.decode(posterior.sample()).sample - batch
            kl = posterior.kl().sum() / posterior.mean.numel()
            loss = error.abs().mean() + error.square().mean() + settings.kl_weight * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            bar.set_postfix(l1=f"{error.detach().abs().mean():.4f}", kl=f"{kl.detach():.2f}", refresh=False)
            bar.update()
    return model.to(memory_format=torch.contiguous_format).eval()


def measure_latents(model: AutoencoderKL, images: np.ndarray) -> dict[str, list[float]]:
    """Statistics over the images and their mirror images, per channel (C,).

    mean and std of latents drawn from the posterior; posterior_std its mean width.
    """
    import torch

    total, count = torch.zeros(3, LATENT_CHANNELS, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in mirrored_batches(images):
            posterior = model.encode(batch).latent_dist
            mean, std = posterior.mean.double(), posterior.std.double()
            total += torch.stack([x.sum((0, 2, 3)) for x in (mean, mean**2 + std**2, std)])
            count += mean.numel() // LATENT_CHANNELS
    mean, square, width = total / count
    return {
        "mean": mean.tolist(),
        "std": (square - mean**2).sqrt().tolist(),
        "posterior_std": width.tolist(),
    }


def measure_reconstructions(model: AutoencoderKL, images: np.ndarray) -> float:
    """Mean absolute error of reconstructions from the posterior's mean, in levels of 255.

    Over `MEASURED` of the images, evenly spaced, and their mirror images.
    """
    import torch

    absolute, images = 0.0, images[:: math.ceil(len(images) / MEASURED)]
    with torch.no_grad():
        for batch in mirrored_batches(images):
            again = model.decode(model.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            absolute += 127.5 * float((again - batch).abs().mean((1, 2, 3)).sum())
    return absolute / (2 * len(images))


def mirrored_batches(images: np.ndarray) -> Iterator[torch.Tensor]:
    """All images and their mirror images, (256, 3, S, S) at a time."""
    import torch

    for start in range(0, len(images), 128):
        batch = as_batch(images[start : start + 128])
        yield torch.cat([batch, batch.flip(-1)])


def equalize_channels(model: AutoencoderKL, statistics: dict[str, Any]) -> float:
    """Give the latents mean 0 and one common standard deviation in every channel; return that deviation.

    Exact: z' = (z - mean) * gain is folded into the 1x1 convolutions on both sides of the latents, so reconstructions
    stay as they are. A diffusion model, which has one scale factor for all channels, gets them all alike.
    """
    import torch

    mean, std = torch.tensor(statistics["mean"]), torch.tensor(statistics["std"])
    common = float(std.square().mean().sqrt())
    gain = common / std
    before, after = model.quant_conv, model.post_quant_conv
    with torch.no_grad():
        before.weight[: len(mean)] *= gain[:, None, None, None]
        before.bias[: len(mean)] = (before.bias[: len(mean)] - mean) * gain
        before.bias[len(mean) :] += 2 * gain.log()  # log variances
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight /= gain[None, :, None, None]
    return common


def is_done(out: Path, record: dict[str, Any]) -> bool:
    """Whether ``out`` holds an undamaged autoencoder of the same settings and images."""
    try:
        found = json.loads((out / RECORD).read_text())
        return all(found.get(key) == record[key] for key in record) and sha256_of(out / WEIGHTS) == found["sha256"]
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def save(out: Path, model: AutoencoderKL, record: dict[str, Any]) -> None:
    """Write the folder ``out``, whole or not at all; what an earlier training left there is replaced."""
    import safetensors

    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    try:
        model.save_pretrained(partial, safe_serialization=True)
        write_json(partial / RECORD, {**record, "sha256": sha256_of(partial / WEIGHTS)})
        with open(partial / WEIGHTS, "rb") as weights:
            os.fsync(weights.fileno())
        if out.exists():
            out.rename(old)
        partial.rename(out)
        sync_directory(out.parent)
    except safetensors.SafetensorError as problem:  # also a full disk
        raise UserError(f"cannot write the autoencoder to {out}: {problem}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def parse_arguments(argv: list[str] | None) -> tuple[Path, Path, Settings]:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder, .tar or .zip of images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the autoencoder into")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 32 images (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels", default="16,32,32", help="width of each level (default 16,32,32)")
    args = parser.parse_args(argv)
    try:
        channels = tuple(int(width) for width in args.channels.split(","))
    except ValueError as problem:
        raise UserError(f"--channels {args.channels} must be whole numbers such as 16,32,32") from problem
    if min(channels) < 1 or args.steps < 1 or args.seed < 0:
        raise UserError(f"--channels {args.channels}, --steps {args.steps}: must be at least 1; --seed at least 0")
    factor = 2 ** (len(channels) - 1)
    if args.image_size < factor or args.image_size % factor:
        raise UserError(f"--image-size {args.image_size} must be a multiple of {factor}, for {len(channels)} levels")
    if args.out.exists() and not (args.out / RECORD).is_file() and (args.out.is_file() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} holds something else; choose a new folder for the autoencoder")
    return args.data, args.out, Settings(args.image_size, args.steps, args.seed, channels)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    data, out, settings = parse_arguments(argv)
    images = read_all_images(list_images(data), settings.image_size)
    record = {
        "settings": {**asdict(settings), "channels": list(settings.channels)},
        "images": {"num": len(images), "sha256": hashlib.sha256(images.tobytes()).hexdigest()},
    }
    if is_done(out, record):
        print(f"{out} already holds the autoencoder of these images and settings")
        return
    print(f"training an autoencoder on {len(images)} images of {data}, {settings.steps} steps, into {out}", flush=True)
    model = train(images, settings)
    common = equalize_channels(model, measure_latents(model, images))
    model.register_to_config(scaling_factor=1 / common)
    error = measure_reconstructions(model, images)
    statistics = {**measure_latents(model, images), "mean_absolute_error": error}
    save(out, model, {**record, "scaling_factor": 1 / common, "latents": statistics})
    print(f"wrote {out}: mean absolute error {error:.2f} of 255 levels, scaling_factor {1 / common:.4f}")


if __name__ == "__main__":
    main()
