"""Random access to an extracted data set of latents, from memory-mapped shards."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from switchdit.data.latent_shards import CONTINUE, image_shape, read_manifest
from switchdit.data.npy_header import LONGEST, NpyHeader, parse_npy_header
from switchdit.errors import UserError
from switchdit.files import inside, sha256_of
from switchdit.progress import progress

UNKNOWN = "unknown"  # the SHA-256 of an autoencoder that imported latents know by name alone

# N = images in the data set, n = images asked for, (C, h, w) = latent_shape


class LatentDataset:
    """The latents that ``tools/extract_latents.py`` or ``tools/import_latents.py`` left in a folder.

    labels: int64 (N,). latent_shape: (C, h, w). scale_factor: of the autoencoder; NOT yet applied to what `moments`
    returns. vae_sha256: of the autoencoder's weights, or `UNKNOWN`. image_size: in pixels. has_flip: flipped latents
    are stored. stored: "moments", or "sample" for one draw from the posterior, whose standard deviation reads as zero.

    Opening checks sizes, counts and shapes of all files against the manifest, not their content: `verify` does that.
    Beside labels nothing is read into memory before it is asked for, and what is read then stays in the page cache.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.num_classes: int = self.manifest["num_classes"]
        self.class_names: list[str] = self.manifest["class_names"]
        self.latent_shape: tuple[int, int, int] = tuple(self.manifest["latent_shape"])
        self.scale_factor = float(self.manifest["scale_factor"])
        self.vae_sha256: str = self.manifest["vae"]["sha256"]
        self.image_size: int = self.manifest["image_size"]
        self.has_flip: bool = self.manifest["flip"]
        self.stored: str = self.manifest["stored"]
        self._image_shape = image_shape(self.latent_shape, self.has_flip, self.stored)
        self.labels = self._open_labels()
        self._shards = [
            self._open_array(e, np.float16, (e["num"], *self._image_shape)) for e in self.manifest["shards"]
        ]
        self._lengths = np.array([len(shard) for shard in self._shards], np.int64)
        self._ends = np.cumsum(self._lengths)

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self):
        return LatentDataset, (self.path,)  # pickled for a worker process, the maps would turn into copies

    def moments(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of images, each float32 (n, C, h, w), UNscaled, in the order asked for.

        indices: integers (n,) in [0, N), repetition allowed. flipped: bool (n,), True for the mirrored image.
        """
        indices = np.asarray(indices)
        flipped = np.asarray(flipped)
        if indices.ndim != 1 or indices.shape != flipped.shape or flipped.dtype != np.bool_:
            raise ValueError(
                f"indices {indices.shape} and flipped {flipped.shape} {flipped.dtype} must be (n,) integers and bools"
            )
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices from {indices.min()} to {indices.max()} for {len(self)} images")
        if not self.has_flip and flipped.any():
            raise ValueError(f"{self.path} holds no flipped images")
        moments = np.zeros((len(indices), 2, *self.latent_shape), np.float32)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        within = indices - (self._ends[shard_of] - self._lengths[shard_of])
        numbers = self._image_shape[1]
        # One by one: straight from the map into float32 is faster than to gather float16 first, shard by shard.
        for i, (shard, image, view) in enumerate(
            zip(shard_of.tolist(), within.tolist(), flipped.astype(int).tolist(), strict=True)
        ):
            moments[i, :numbers] = self._shards[shard][image, view]
        return moments[:, 0], moments[:, 1]

    @cached_property
    def names(self) -> list[str]:
        """Where each image came from, N strings; read when first asked for. Raises `UserError` for a damaged file."""
        path = inside(self.path, self.manifest["names"]["file"])
        try:
            names = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as problem:
            raise UserError(f"{path} is missing or damaged; {CONTINUE}") from problem
        if not isinstance(names, list) or len(names) != len(self) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path} is damaged: not a list of {len(self)} names")
        return names

    @property
    def files(self) -> list[dict[str, Any]]:
        """The manifest's entries of labels, names and shards."""
        return [self.manifest["labels"], self.manifest["names"], *self.manifest["shards"]]

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; `UserError` naming the first damaged one."""
        for entry in progress(self.files, desc=f"checking {self.path}", unit="file"):
            path = inside(self.path, entry["file"])
            if not path.is_file():
                raise UserError(f"{path} is missing; {CONTINUE}")
            try:
                sha256 = sha256_of(path)
            except OSError as problem:
                raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
            if sha256 != entry["sha256"]:
                raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's; delete it, then {CONTINUE}")

    def _open_labels(self) -> np.ndarray:
        entry = self.manifest["labels"]
        labels = np.array(self._open_array(entry, np.int64, (self.manifest["num_images"],)))
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise UserError(
                f"{self.path / entry['file']} has classes {labels.min()} to {labels.max()}, the manifest "
                f"{self.num_classes} classes"
            )
        return labels

    def _open_array(self, entry: dict[str, Any], dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        """Memory map of a file that holds just what the manifest says."""
        path = inside(self.path, entry["file"])
        if not path.is_file():
            raise UserError(f"{path} is missing; {CONTINUE}")
        size = path.stat().st_size
        if size != entry.get("bytes", size):
            raise UserError(f"{path} has {size} bytes, the manifest says {entry['bytes']}; {CONTINUE}")
        try:
            with open(path, "rb") as file:
                header = _sound_header(file, path, np.dtype(dtype), shape, size)
                if size == header.offset:  # nothing cannot be mapped
                    return np.empty(shape, dtype)
                # Without np.memmap's own class around it an array is indexed faster.
                return np.asarray(np.memmap(file, dtype, "r", header.offset, shape))
        except OSError as problem:  # such as the limit of open files, which a thousand shards can meet
            raise UserError(f"{path} cannot be read: {problem.strerror}") from problem


def _sound_header(file: IO[bytes], path: Path, dtype: np.dtype, shape: tuple[int, ...], size: int) -> NpyHeader:
    try:
        header = parse_npy_header(file.read(LONGEST))
    except ValueError as problem:
        raise UserError(f"{path} is damaged: {problem}") from problem
    if (header.dtype, header.shape) != (dtype, shape):
        raise UserError(f"{path} holds {header.dtype} {header.shape}, the manifest says {dtype} {shape}")
    if size != header.file_size:
        raise UserError(f"{path} is damaged: it has {size} bytes, {header.file_size} by its head; {CONTINUE}")
    return header
