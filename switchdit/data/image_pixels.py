"""Image files as squares of pixels, as ADM makes them, decoded ahead in worker processes.

RGB, halved with a box filter while the shorter side is at least twice the size, bicubic to the size, centre crop;
besides, EXIF orientation is honoured.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import struct
import tempfile
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from switchdit.data.image_source import ImageSource
from switchdit.errors import UserError
from switchdit.files import allocate
from switchdit.progress import progress

# Other formats are not even tried: Pillow would start Ghostscript for a PostScript file, whatever its name.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
TRANSFORM = "EXIF orientation, RGB, box-halve, bicubic, centre crop"


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

# Pillow also logs what it then raises.
logging.getLogger("PIL").addHandler(logging.NullHandler())

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


def load_image(file: str | Path | BinaryIO, size: int) -> np.ndarray:
    """One image file as uint8 (size, size, 3); raises `UnreadableImage`."""
    try:
        with warnings.catch_warnings():
            # of broken EXIF and of more than 90 million pixels, both of which sound photographs have
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                image.load()
                return square(to_rgb(image), size)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as problem:
        raise UnreadableImage(f"it is none of {', '.join(FORMATS)}") from problem
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
    return pixels[top : top + size, left : left + size].copy()


# ------------------------------------------------------------------------------------------ many, in processes


def read_images(
    source: ImageSource, indices: Iterable[int], size: int, workers: int, ahead: int
) -> Iterator[np.ndarray | UnreadableImage]:
    """The images ``indices`` of ``source`` in that order: uint8 (size, size, 3), or why there is none.

    workers: processes that read and decode; 0 to do it in this one. ahead: images at most that are under way or
    waiting to be taken. Raises `UserError` when a worker process dies.

    Pixels come through a temporary file, so that a worker's answer is less than a pipe takes at once: of a
    larger one a worker that is killed leaves half, and whoever reads it waits for the rest for ever.
    """
    if workers == 0:
        yield from (_load(source.reader(index), size) for index in indices)
        return
    descriptor, path = tempfile.mkstemp(prefix="switchdit-images-")
    os.close(descriptor)
    slots = allocate(path, (ahead, size, size, 3))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _set_up_worker, (path, slots.shape))
    indices, waiting = iter(indices), deque()

    def begin(slot: int) -> None:
        for index in islice(indices, 1):
            waiting.append((slot, pool.submit(_load_into, slot, source.reader(index), size)))

    try:
        for slot in range(ahead):
            begin(slot)
        while waiting:
            slot, future = waiting.popleft()
            problem = future.result()
            image = problem or slots[slot].copy()
            begin(slot)
            yield image
    except BrokenProcessPool as problem:
        raise UserError(
            "a worker process that decodes images has died; was it killed for want of memory? "
            f"Try fewer than --workers {workers}"
        ) from problem
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.unlink(path)


def read_all_images(source: ImageSource, size: int) -> np.ndarray:
    """All images in memory, uint8 (N, size, size, 3); `UserError` naming one that cannot be read."""
    images = np.empty((len(source.names), size, size, 3), np.uint8)
    loaded = read_images(source, range(len(images)), size, workers=0, ahead=0)
    for index, image in enumerate(progress(loaded, desc="reading images", total=len(images), unit="image")):
        if isinstance(image, UnreadableImage):
            raise UserError(f"cannot read the image {source.where(index)}: {image}; repair or remove it")
        images[index] = image
    return images


def _load(read: Callable[[], bytes], size: int) -> np.ndarray | UnreadableImage:
    try:
        return load_image(io.BytesIO(read()), size)
    except UnreadableImage as problem:
        return problem
    except OSError as problem:
        return UnreadableImage(problem.strerror or str(problem))
    except (ValueError, zlib.error) as problem:
        return UnreadableImage(str(problem))


def _load_into(slot: int, read: Callable[[], bytes], size: int) -> UnreadableImage | None:
    """Of a worker: the image is left in its slot, or why there is none is returned, in 1,000 characters at most."""
    image = _load(read, size)
    if isinstance(image, UnreadableImage):
        return UnreadableImage(str(image)[:1000])
    _slots[slot] = image
    return None


def _set_up_worker(path: str, shape: tuple[int, ...]) -> None:
    global _slots
    _slots = np.memmap(path, np.uint8, "r+", shape=shape)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_leave_with_parent, args=(path,), daemon=True).start()


def _leave_with_parent(path: str) -> None:
    """A killed parent tells nobody: its workers would wait for work for ever, and its file would stay."""
    multiprocessing.parent_process().join()
    with contextlib.suppress(OSError):
        os.unlink(path)
    os._exit(1)
