"""Folders of images: which files, of which class, in which order; and each file as a square of pixels, as ADM makes it.

RGB, halved with a box filter while the shorter side is at least twice the size, bicubic to the size, centre crop;
besides, EXIF orientation is honoured.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from switchdit.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
TRANSFORM = "EXIF orientation, RGB, box-halve, bicubic, centre crop"


@dataclass
class ImageFolder:
    """Image files in their fixed order: by class, then by path. names are relative to root, with slashes."""

    root: Path
    class_names: list[str]
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # bytes


def list_images(root: Path) -> ImageFolder:
    """List the images of a folder; `UserError` when there are none or when it is unclear which class they have."""
    if not root.is_dir():
        raise UserError(f"--data {root} is {'a file, not a folder' if root.exists() else 'not there'}")
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    loose = [path for path in visible if path.suffix.lower() in EXTENSIONS and path.is_file()]
    classes = [path for path in visible if path.is_dir()]
    if loose and classes:
        raise UserError(
            f"--data {root} holds class folders ({classes[0].name}) and images outside of them ({loose[0].name}); "
            "move either"
        )
    if not loose and not classes:
        raise UserError(f"--data {root} holds no images ({' '.join(sorted(EXTENSIONS))}) and no class folders")
    folder = ImageFolder(root, [path.name for path in classes] or ["unconditional"])
    for label, paths in enumerate(map(_images_below, classes) if classes else [loose]):
        if not paths:
            raise UserError(f"--data {root}: the class folder {classes[label].name} holds no images; remove or fill it")
        for path in paths:
            folder.names.append(path.relative_to(root).as_posix())
            folder.labels.append(label)
            folder.sizes.append(path.stat().st_size)
    return folder


def _images_below(top: Path) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return sorted(paths, key=Path.as_posix)


class UnreadableImage(ValueError):
    """Why an image file cannot be used."""


# Pillow reports damaged files in all of these ways.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# EXIF orientation -> what turns the stored image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: Path, size: int) -> np.ndarray:
    """One image file as uint8 (size, size, 3); raises `UnreadableImage`."""
    try:
        with Image.open(path) as image:
            image.load()
            return square(to_rgb(image), size)
    except UnreadableImage:
        raise
    except DAMAGED as problem:
        raise UnreadableImage(str(problem).split("\n")[0] or type(problem).__name__) from problem


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB. Alpha is dropped, not blended, as ADM and DiT do; 16 bits of grey become 8."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except DAMAGED:  # broken EXIF around a sound image is common; viewers show such images as they are stored
        orientation = 1
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode == "F":
        raise UnreadableImage("pixels are floating-point numbers, of no agreed range")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts all above 255 off
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UnreadableImage("pixels have more than 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about palettes with transparency
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> np.ndarray:
    """RGB image to uint8 (size, size, 3): halving with a box filter, bicubic, centre crop, as in ADM."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or 1 << 28):
        raise UnreadableImage(f"{image.width} x {image.height} is too long and thin to be enlarged")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def in_order(pool: ThreadPoolExecutor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """Results of ``work(item)`` in the order of the items; at most ``ahead`` are computed or waiting."""
    items = iter(items)
    waiting = deque(pool.submit(work, item) for item in islice(items, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(work, item) for item in islice(items, 1))
        yield result
