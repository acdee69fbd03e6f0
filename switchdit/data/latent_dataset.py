"""Random access to an extracted data set of latents, from memory-mapped shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from switchdit.data.latent_shards import CONTINUE, image_shape, read_manifest
from switchdit.errors import UserError
from switchdit.files import sha256_of
from switchdit.progress import progress

# N = images in the data set, n = images asked for, (C, h, w) = latent_shape, V = views, K = numbers per value


class LatentDataset:
    """The latents that ``tools/extract_latents.py`` left in a folder.

    labels: int64 (N,). latent_shape: (C, h, w). scale_factor: of the autoencoder; NOT yet applied to what `moments`
    returns. vae_sha256: of the autoencoder's weights. image_size: in pixels. has_flip: flipped latents are stored.
    stored: "moments", or "sample" for one draw from the posterior, whose standard deviation reads as zero.

    Opening checks sizes, counts and shapes of all files against the manifest, not their content: `verify` does that.
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
        self._shards = [self._open_shard(entry) for entry in self.manifest["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

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
        numbers = self._image_shape[1]
        shard_of = np.searchsorted(self._ends, indices, side="right")
        order = np.argsort(shard_of, kind="stable")
        starts = np.flatnonzero(np.diff(shard_of[order], prepend=-1))
        for group in np.split(order, starts[1:]):
            if not len(group):
                continue
            shard = self._shards[shard_of[group[0]]]
            within = indices[group] - (self._ends[shard_of[group[0]]] - len(shard))
            moments[group, :numbers] = shard[within, flipped[group].astype(np.intp)]
        return moments[:, 0], moments[:, 1]

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; `UserError` naming the first damaged one."""
        entries = [self.manifest["labels"], self.manifest["names"], *self.manifest["shards"]]
        for entry in progress(entries, desc=f"checking {self.path}", unit="file"):
            if sha256_of(self.path / entry["file"]) != entry["sha256"]:
                raise UserError(
                    f"{self.path / entry['file']} is damaged: its SHA-256 is not the manifest's; delete it, then "
                    f"{CONTINUE}"
                )

    def _open_labels(self) -> np.ndarray:
        path = self.path / self.manifest["labels"]["file"]
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as problem:
            raise UserError(f"{path} is missing or damaged; {CONTINUE}") from problem
        if labels.shape != (self.manifest["num_images"],) or labels.dtype != np.int64:
            raise UserError(
                f"{path} holds {labels.dtype} {labels.shape}, the manifest says int64 ({self.manifest['num_images']},)"
            )
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise UserError(
                f"{path} has classes {labels.min()} to {labels.max()}, the manifest {self.num_classes} classes"
            )
        return labels

    def _open_shard(self, entry: dict) -> np.ndarray:
        """Memory map of one shard, float16 (num, V, K, C, h, w)."""
        path = self.path / entry["file"]
        if not path.is_file():
            raise UserError(f"shard {path} is missing; {CONTINUE}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"shard {path} has {size} bytes, the manifest says {entry['bytes']}; {CONTINUE}")
        try:
            shard = np.load(path, mmap_mode="r" if entry["num"] else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as problem:
            raise UserError(f"shard {path} is damaged: {problem}") from problem
        shape = (entry["num"], *self._image_shape)
        if shard.shape != shape or shard.dtype != np.float16:
            raise UserError(f"shard {path} holds {shard.dtype} {shard.shape}, the manifest says float16 {shape}")
        return shard
