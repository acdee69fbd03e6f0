"""Sets of images to score: .npz files in ADM's format, the same arrays in .safetensors, folders of PNG and JPEG.

An .npz of 50,000 images of 256 x 256 holds 9.8 GB: it is read block by block, and never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from switchdit.data.image_pixels import DAMAGED as DAMAGED_IMAGE
from switchdit.data.image_pixels import to_rgb
from switchdit.errors import UserError
from switchdit.files import sha256_of
from switchdit.progress import progress
from tools.array_files import DAMAGED, Header, NpzArrays, SafetensorsArrays

# N = images, H, W = pixels, F = features

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # others are not even tried: Pillow starts Ghostscript for what turns out to be PostScript
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
LARGEST_SIDE, LARGEST_COUNT = 1 << 14, 10**7  # pixels, images: a header with more is damaged
LARGEST_DIMENSION = 1 << 13  # of statistics
MOST_THREADS = 8  # that decode images: more do not keep a network busier


class ImageSet(Protocol):
    """Images of one size.

    count: N, 0 when there are only statistics. shape: (H, W). labels: (N,) integers or None.
    statistics: those of ``mu, sigma, mu_s, sigma_s`` that the file holds. option: the name users know it by.
    """

    option: str
    path: Path
    count: int
    shape: tuple[int, int]
    labels: np.ndarray | None
    statistics: dict[str, np.ndarray]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images ``start`` to ``stop`` (all of them) in order, (size, H, W, 3) uint8 at a time.

        Raises `UserError` where they turn out to be damaged.
        """
        ...

    def sha256(self) -> str:
        """Of the file, or of the names and contents of a folder's images; computed once."""
        ...

    def check_unchanged(self) -> None:
        """Raise `UserError` if a file of the set is not as it was when the set was opened."""
        ...


def open_images(path: Path, option: str) -> ImageSet:
    """Look at ``path`` without reading its images; ``option`` is what messages call it. Raises `UserError`."""
    if path.is_dir():
        return _open_folder(path, option)
    if not path.exists():
        raise UserError(f"{option} {path} does not exist")
    return _open_arrays(path, option)


def describe(images: ImageSet) -> dict[str, Any]:
    """Path, SHA-256, number and size of the images, for metrics.json."""
    size = {"height": images.shape[0], "width": images.shape[1]} if images.count else None
    images.check_unchanged()  # its checksum shall be of what was scored
    return {"path": str(images.path), "sha256": images.sha256(), "count": images.count, "image_size": size}


def _reason(problem: BaseException) -> str:
    return (str(problem).split("\n")[0] or type(problem).__name__)[:200]


def _state(paths: Iterable[Path]) -> list[tuple[int, ...] | None]:
    """What changes when a file does, or None for one that is gone."""
    states = []
    for path in paths:
        try:
            about = path.stat()
            states.append((about.st_ino, about.st_size, about.st_mtime_ns))
        except OSError:
            states.append(None)
    return states


# ------------------------------------------------------------------------------------------- files of arrays


@dataclass
class ArrayImages:
    """`ImageSet` of a .npz or .safetensors file: arr_0 (images), arr_1 (labels), and statistics."""

    option: str
    path: Path
    arrays: NpzArrays | SafetensorsArrays
    count: int = 0
    shape: tuple[int, int] = (0, 0)
    labels: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    digest: str | None = None

    def __post_init__(self):
        self.opened = _state([self.path])

    def check_unchanged(self) -> None:
        if _state([self.path]) != self.opened:
            raise UserError(f"{self.option} {self.path} has changed while it was read; start again")

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        try:
            yield from self.arrays.blocks("arr_0", size, start, self.count if stop is None else stop)
        except DAMAGED as problem:
            raise UserError(f"{self.option} {self.path}: arr_0 is damaged ({_reason(problem)})") from problem

    def sha256(self) -> str:
        if self.digest is None:
            digest = hashlib.sha256()
            with (
                open(self.path, "rb") as file,
                progress(desc=f"checksum of {self.path.name}", total=os.fstat(file.fileno()).st_size, unit="B") as bar,
            ):
                bar.unit_scale = True
                while block := file.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            self.digest = digest.hexdigest()
        return self.digest


def _open_arrays(path: Path, option: str) -> ArrayImages:
    kind, reader = (".safetensors", SafetensorsArrays) if path.suffix == ".safetensors" else (".npz", NpzArrays)
    try:
        images = ArrayImages(option, path, reader(path, ("arr_0", "arr_1", *STATISTICS)))
        headers = images.arrays.headers
        for name, header in headers.items():
            if header.fault:
                raise UserError(f"{option} {path}: {name} {header.fault}")
        if "arr_0" in headers:
            header = headers["arr_0"]
            _check_images(header, images)
            images.count, images.shape = header.shape[0], (header.shape[1], header.shape[2])
            if "arr_1" in headers:
                images.labels = _read_labels(headers["arr_1"], images)
        for name in STATISTICS:
            if name in headers:
                images.statistics[name] = _read_statistics(name, headers[name], images)
    except DAMAGED as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{option} {path} is not a sound {kind} file ({_reason(problem)})") from problem
    if not images.count and not images.statistics:
        listing = _listing(images.arrays.members)
        raise UserError(f"{option} {path} has no array arr_0 (images, uint8, NHWC); it holds {listing}")
    return images


def _check_images(header: Header, images: ArrayImages) -> None:
    fault = None
    if header.dtype != "uint8":
        hint = "; images are expected as integers from 0 to 255" if header.kind == "f" else ""
        fault = f"has dtype {header.dtype}, not uint8{hint}"
    elif len(header.shape) != 4 or header.shape[3] != 3:
        fault = f"has shape {header.shape}, not (N, height, width, 3)"
    elif header.shape[0] == 0:
        fault = "holds no images"
    elif not all(1 <= side <= LARGEST_SIDE for side in header.shape[1:3]) or header.shape[0] > LARGEST_COUNT:
        fault = f"has shape {header.shape}, which no set of images has"
    if fault:
        raise UserError(f"{images.option} {images.path}: arr_0 {fault}")


def _read_labels(header: Header, images: ArrayImages) -> np.ndarray:
    """(N,) int64."""
    if header.kind not in "iu" or header.shape != (images.count,):
        raise UserError(
            f"{images.option} {images.path}: arr_1 (labels) has dtype {header.dtype} and shape {header.shape}; "
            f"expected {images.count} integers"
        )
    return images.arrays.read("arr_1").astype(np.int64)


def _read_statistics(name: str, header: Header, images: ArrayImages) -> np.ndarray:
    """(F,) or (F, F) float64."""
    dimensions = 1 if name.startswith("mu") else 2
    too_large = max(header.shape, default=0) > LARGEST_DIMENSION
    if header.kind != "f" or len(header.shape) != dimensions or len(set(header.shape)) != 1 or too_large:
        raise UserError(
            f"{images.option} {images.path}: {name} has dtype {header.dtype} and shape {header.shape}; "
            f"expected floats of shape {'(F,)' if dimensions == 1 else '(F, F)'}"
        )
    values = images.arrays.read(name).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{images.option} {images.path}: {name} holds values that are not finite")
    return values


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


# -------------------------------------------------------------------------------------------- image folders


@dataclass
class FolderImages:
    """`ImageSet` of the PNG and JPEG files below a folder, in the order of their paths."""

    option: str
    path: Path
    names: list[str]
    shape: tuple[int, int]
    labels: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    digest: str | None = None

    def __post_init__(self):
        self.opened = self._states()

    def _states(self) -> list[tuple[int, ...] | None]:
        return _state(self.path / name for name in self.names)

    def check_unchanged(self) -> None:
        for name, before, now in zip(self.names, self.opened, self._states(), strict=True):
            if before != now:
                raise UserError(f"{self.option} {self.path}: {name} has changed while it was read; start again")

    @property
    def count(self) -> int:
        return len(self.names)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        names = self.names[start:stop]
        pool = ThreadPoolExecutor(_threads())

        def decode(first: int) -> list[Future]:
            return [pool.submit(self._read, name) for name in names[first : first + size]]

        try:
            ahead = decode(0)
            for first in range(0, len(names), size):
                batch, ahead = ahead, decode(first + size)
                yield np.stack([image.result() for image in batch])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, name: str) -> np.ndarray:
        try:
            image = _decode(self.path / name, self.option)
            if image.shape[:2] != self.shape:
                raise UserError(
                    f"{self.option} {self.path}: {name} is {_by(image.shape)}, but {self.names[0]} is "
                    f"{_by(self.shape)}; tools/pack_images.py brings a folder to one size"
                )
        except UserError:
            self.check_unchanged()  # half of an image that is being replaced is no bad image
            raise
        return image

    def sha256(self) -> str:
        if self.digest is None:
            digest = hashlib.sha256()
            for name in self.names:
                digest.update(f"{name}\0{sha256_of(self.path / name)}\n".encode())
            self.digest = digest.hexdigest()
        return self.digest


def _open_folder(path: Path, option: str) -> FolderImages:
    names = sorted(
        Path(parent, name).relative_to(path).as_posix()
        for parent, _, files in os.walk(path, followlinks=True)
        for name in files
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    if not names:
        raise UserError(f"{option} {path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return FolderImages(option, path, names, _decode(path / names[0], option).shape[:2])


def _decode(path: Path, option: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > LARGEST_SIDE:
                raise ValueError(f"{_by(image.size[::-1])} pixels are more than any image to score has")
            image.load()
            return np.asarray(to_rgb(image))
    except DAMAGED_IMAGE as problem:
        raise UserError(f"{option}: image {path} cannot be read ({_reason(problem)})") from problem


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _threads() -> int:
    """The cores of this process, which it shares with the others that a launcher started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return min(MOST_THREADS, max(1, cores // processes))
