"""What can be said of extracted latents: are all files whole, how are their values spread, what is lost in them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError
from switchdit.files import atomic_write
from switchdit.progress import progress, say

if TYPE_CHECKING:
    from PIL import Image

    from switchdit.data.autoencoder import Autoencoder

# n = images in a block, C = latent channels, S = pixels of a side

BLOCK = 256
# The contact sheet, in pixels.
SMALLEST, GAP, LINE, WIDEST, TEXT = 128, 12, 22, 2000, 16


def verify(out: Path) -> None:
    """Compare every file of a data set with its checksum and print a line; `UserError` naming a damaged file."""
    started = time.monotonic()
    data = LatentDataset(out)
    data.verify()
    size = sum((out / entry["file"]).stat().st_size for entry in data.files)
    say(
        f"{out} is whole: {len(data)} images, {len(data.files)} files, {size} bytes checked "
        f"in {time.monotonic() - started:.1f} s"
    )


@dataclass(frozen=True)
class ChannelStatistics:
    """Of each channel, float64 (C,), UNscaled: mean and standard deviation of what training draws from the
    posteriors, mirrored images included, and the extremes of the posteriors' means."""

    mean: np.ndarray
    std: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray


def channel_statistics(data: LatentDataset) -> ChannelStatistics:
    """One pass over a data set, `BLOCK` images at a time."""
    if not len(data):
        raise UserError(f"{data.path} holds no images")
    channels = data.latent_shape[0]
    total, squares = np.zeros(channels), np.zeros(channels)
    lowest, highest = np.full(channels, np.inf), np.full(channels, -np.inf)
    views = (False, True) if data.has_flip else (False,)
    with progress(desc=f"statistics of {data.path}", total=len(data), unit="image") as bar:
        for start in range(0, len(data), BLOCK):
            indices = np.arange(start, min(start + BLOCK, len(data)))
            for view in views:
                mean, std = (x.astype(np.float64) for x in data.moments(indices, np.full(len(indices), view)))
                total += mean.sum(axis=(0, 2, 3))
                squares += np.einsum("nchw,nchw->c", mean, mean) + np.einsum("nchw,nchw->c", std, std)
                lowest = np.minimum(lowest, mean.min(axis=(0, 2, 3)))
                highest = np.maximum(highest, mean.max(axis=(0, 2, 3)))
            bar.update(len(indices))
    count = len(views) * len(data) * math.prod(data.latent_shape[1:])
    mean = total / count
    # Var[mean + std * noise] = E[std^2] + Var[mean]
    return ChannelStatistics(mean, np.sqrt(np.maximum(squares / count - mean**2, 0)), lowest, highest)


def print_statistics(out: Path) -> None:
    """Print a table of `channel_statistics`, as stored and as a model sees them."""
    data = LatentDataset(out)
    found, scale = channel_statistics(data), data.scale_factor
    views = ", each also mirrored" if data.has_flip else ""
    say(f"{out}: {len(data)} images{views}; stored: {data.stored}; scaled by {scale:g} for training")
    say(f"{'':>7} {'as stored':^43} {'scaled':^21}")
    say(f"{'channel':>7} {'mean':>10} {'std':>10} {'min':>10} {'max':>10} {'mean':>10} {'std':>10}")
    for c, row in enumerate(zip(found.mean, found.std, found.lowest, found.highest, strict=True)):
        say(f"{c:>7} " + " ".join(f"{value:>10.4f}" for value in (*row, scale * row[0], scale * row[1])))
    say("mean and std are those of draws from the posteriors, min and max those of the posteriors' means")


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; infinite when they are the same."""
    error = np.mean((image.astype(np.float64) - other) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def write_preview(
    images: Sequence[np.ndarray], names: Sequence[str], autoencoder: Autoencoder, path: Path
) -> list[float]:
    """Write a contact sheet, each image beside its reconstruction from the posterior's mean; print and return PSNRs.

    images: uint8 (S, S, 3). names: to write below them. path: of a PNG file.
    """
    decoded = [reconstruct(image, autoencoder) for image in progress(images, desc="preview", unit="image")]
    ratios = [psnr(image, other) for image, other in zip(images, decoded, strict=True)]
    texts = [f"{name}  {_decibels(ratio)}" for name, ratio in zip(names, ratios, strict=True)]
    title = f"image | reconstruction by {autoencoder.identity['name']}"
    sheet = contact_sheet([np.concatenate(pair, axis=1) for pair in zip(images, decoded, strict=True)], texts, title)
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")
    say(f"wrote {path}: {len(images)} images beside their reconstructions, mean PSNR {_decibels(np.mean(ratios))}")
    return ratios


def reconstruct(image: np.ndarray, autoencoder: Autoencoder) -> np.ndarray:
    """uint8 (S, S, 3) -> what the autoencoder makes of it, by way of the posterior's mean; the same shape."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, _ = autoencoder.encode(pixels)
    return autoencoder.decode(mean * autoencoder.scale_factor)[0].cpu().numpy()


def contact_sheet(pictures: Sequence[np.ndarray], texts: Sequence[str], title: str) -> Image.Image:
    """Pictures of one size, uint8 (H, W, 3), in rows, each with a line below; small ones are enlarged."""
    from PIL import Image

    from tools.drawing import write

    height, width = (side * math.ceil(SMALLEST / pictures[0].shape[0]) for side in pictures[0].shape[:2])
    columns = min(len(pictures), max(1, (WIDEST - GAP) // (width + GAP)))
    rows = math.ceil(len(pictures) / columns)
    top = GAP + LINE
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), top + rows * (height + LINE + GAP)), "white")
    write(sheet, (GAP, top / 2), fitting(title, sheet.width - 2 * GAP), TEXT, anchor="lm")
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(i, columns)
        left, upper = GAP + column * (width + GAP), top + row * (height + LINE + GAP)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, upper))
        write(sheet, (left + width / 2, upper + height + LINE / 2), fitting(text, width), TEXT)
    return sheet


def fitting(text: str, width: int) -> str:
    """The end of ``text`` that is at most ``width`` pixels wide: of a long path the file's name."""
    from PIL import ImageFont

    font = ImageFont.load_default(TEXT)
    text = "".join(c if c.isprintable() else "?" for c in text)  # names of files need not be text
    shortened = text
    while text and font.getlength(shortened) > width:
        text = text[1:]
        shortened = f"...{text}"
    return shortened


def _decibels(ratio: float) -> str:
    return f"{ratio:.2f} dB" if math.isfinite(ratio) else "exact"
