"""Sets of images to score, read block by block: .npz files in ADM's format, and folders of PNG and JPEG.

An .npz of 50,000 images of 256 x 256 holds 9.8 GB: it is never in memory as a whole. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from switchdit.errors import UserError
from switchdit.files import sha256_of

# N = images, H, W = pixels, F = features

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LONGEST_HEADER = 10_000  # characters of a .npy header: numpy's own limit
LARGEST_SIDE, LARGEST_COUNT = 1 << 14, 10**8  # pixels, images: a header with more is damaged
LARGEST_DIMENSION = 1 << 13  # of statistics
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


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

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, (size, H, W, 3) uint8 at a time; `UserError` where they turn out to be damaged."""
        ...

    def sha256(self) -> str:
        """Of the file, or of the names and contents of a folder's images."""
        ...


def open_images(path: Path, option: str) -> ImageSet:
    """Look at ``path`` without reading its images; ``option`` is what messages call it. Raises `UserError`."""
    if path.is_dir():
        return _open_folder(path, option)
    if not path.exists():
        raise UserError(f"{option} {path} does not exist")
    return _open_npz(path, option)


@dataclass(frozen=True)
class NpyHeader:
    """What the head of a .npy member says; rows are the entries of its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass
class NpzImages:
    """`ImageSet` of a .npz file, stored or compressed."""

    option: str
    path: Path
    count: int = 0
    shape: tuple[int, int] = (0, 0)
    labels: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        row = (*self.shape, 3)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _read_header(file)
                for start in range(0, self.count, size):
                    n = min(size, self.count - start)
                    yield _read_exactly(file, np.empty((n, *row), np.uint8))
                # Only when the end has been read does zipfile compare the checksum.
                if file.read(1):
                    raise zipfile.BadZipFile("bytes after the last image")
        except DAMAGED as problem:
            raise UserError(f"{self.option} {self.path}: arr_0 is damaged ({_reason(problem)})") from problem

    def sha256(self) -> str:
        return sha256_of(self.path)


def _open_npz(path: Path, option: str) -> NpzImages:
    images = NpzImages(option, path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            if "arr_0.npy" in members:
                header = _member_header(archive, "arr_0", images)
                _check_images(header, images)
                images.count, images.shape = header.shape[0], (header.shape[1], header.shape[2])
                if "arr_1.npy" in members:
                    images.labels = _read_labels(archive, images)
            for name in ("mu", "sigma", "mu_s", "sigma_s"):
                if f"{name}.npy" in members:
                    images.statistics[name] = _read_statistics(archive, name, images)
    except DAMAGED as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{option} {path} is not a sound .npz file ({_reason(problem)})") from problem
    if not images.count and not images.statistics:
        raise UserError(f"{option} {path} has no array arr_0 (images, uint8, NHWC); it holds {_listing(members)}")
    return images


def _check_images(header: NpyHeader, images: NpzImages) -> None:
    fault = None
    if header.dtype != np.uint8:
        hint = "; images are expected as integers from 0 to 255" if header.dtype.kind == "f" else ""
        fault = f"has dtype {header.dtype}, not uint8{hint}"
    elif len(header.shape) != 4 or header.shape[3] != 3:
        fault = f"has shape {header.shape}, not (N, height, width, 3)"
    elif header.shape[0] == 0:
        fault = "holds no images"
    elif not all(1 <= side <= LARGEST_SIDE for side in header.shape[1:3]) or header.shape[0] > LARGEST_COUNT:
        fault = f"has shape {header.shape}, which no set of images has"
    if fault:
        raise UserError(f"{images.option} {images.path}: arr_0 {fault}")


def _read_labels(archive: zipfile.ZipFile, images: NpzImages) -> np.ndarray:
    header = _member_header(archive, "arr_1", images)
    if header.dtype.kind not in "iu" or header.shape != (images.count,):
        raise UserError(
            f"{images.option} {images.path}: arr_1 (labels) has dtype {header.dtype} and shape {header.shape}; "
            f"expected {images.count} integers"
        )
    return _read_array(archive, "arr_1", header).astype(np.int64)


def _read_statistics(archive: zipfile.ZipFile, name: str, images: NpzImages) -> np.ndarray:
    """(F,) or (F, F) float64."""
    header = _member_header(archive, name, images)
    dimensions = 1 if name.startswith("mu") else 2
    too_large = max(header.shape, default=0) > LARGEST_DIMENSION
    if header.dtype.kind != "f" or len(header.shape) != dimensions or len(set(header.shape)) != 1 or too_large:
        raise UserError(
            f"{images.option} {images.path}: {name} has dtype {header.dtype} and shape {header.shape}; "
            f"expected floats of shape {'(F,)' if dimensions == 1 else '(F, F)'}"
        )
    values = _read_array(archive, name, header).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{images.option} {images.path}: {name} holds values that are not finite")
    return values


def _member_header(archive: zipfile.ZipFile, name: str, images: NpzImages) -> NpyHeader:
    """Header of an array that is no pickle, lies in C order and is as long as it says."""
    with archive.open(f"{name}.npy") as file:
        shape, fortran_order, dtype = _read_header(file)
        length = archive.getinfo(f"{name}.npy").file_size - file.tell()
    fault = None
    if dtype.hasobject or dtype.names:
        fault = f"has dtype {dtype}, which would have to be unpickled" if dtype.hasobject else f"has dtype {dtype}"
    elif fortran_order and len(shape) > 1 and name == "arr_0":
        fault = "lies in Fortran order and cannot be read in blocks; save np.ascontiguousarray(...) of it"
    elif any(side < 0 for side in shape) or length != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        fault = f"is damaged: shape {shape} and dtype {dtype} do not make its {length} bytes"
    if fault:
        raise UserError(f"{images.option} {images.path}: {name} {fault}")
    return NpyHeader(shape, dtype)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file, max_header_size=LONGEST_HEADER)
    return np.lib.format.read_array_header_2_0(file, max_header_size=LONGEST_HEADER)


def _read_array(archive: zipfile.ZipFile, name: str, header: NpyHeader) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False).reshape(header.shape)


def _read_exactly(file: IO[bytes], array: np.ndarray) -> np.ndarray:
    """Fill ``array`` (uint8, C order) from the file and return it."""
    missing = memoryview(array).cast("B")
    while missing:
        length = file.readinto(missing)
        if not length:
            raise EOFError(f"{len(missing)} bytes are missing at its end")
        missing = missing[length:]
    return array


def _reason(problem: Exception) -> str:
    return (str(problem).split("\n")[0] or type(problem).__name__)[:200]


def _listing(names: set[str]) -> str:
    shown = sorted(name.removesuffix(".npy") for name in names)
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "") if shown else "nothing"


@dataclass
class FolderImages:
    """`ImageSet` of the PNG and JPEG files below a folder, in the order of their paths."""

    option: str
    path: Path
    names: list[str]
    shape: tuple[int, int]
    labels: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, size):
            yield np.stack([self._read(name) for name in self.names[start : start + size]])

    def _read(self, name: str) -> np.ndarray:
        image = _decode(self.path / name, self.option)
        if image.shape[:2] != self.shape:
            raise UserError(
                f"{self.option} {self.path}: {name} is {_by(image.shape)}, but {self.names[0]} is {_by(self.shape)}; "
                "tools/pack_images.py brings a folder to one size"
            )
        return image

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{sha256_of(self.path / name)}\n".encode())
        return digest.hexdigest()


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

    from switchdit.data.image_folder import DAMAGED as DAMAGED_IMAGE
    from switchdit.data.image_folder import to_rgb

    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(to_rgb(image))
    except DAMAGED_IMAGE as problem:
        raise UserError(f"{option}: image {path} cannot be read ({_reason(problem)})") from problem


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def describe(images: ImageSet) -> dict[str, Any]:
    """Path, SHA-256, number and size of the images, for metrics.json."""
    size = {"height": images.shape[0], "width": images.shape[1]} if images.count else None
    return {"path": str(images.path), "sha256": images.sha256(), "count": images.count, "image_size": size}
