"""The work of tools/extract_latents.py: who makes which shard, from images to latents, and how it is completed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from switchdit.data.image_pixels import read_images
from switchdit.data.image_source import UNCONDITIONAL, ImageSource
from switchdit.data.latent_conflicts import changed_shards, check_same_plan, check_same_settings, check_unchanged
from switchdit.data.latent_dataset import LatentDataset
from switchdit.data.latent_shards import (
    CONTINUE,
    MANIFEST,
    Plan,
    digest_of,
    finished_shard,
    shard_ranges,
    write_manifest,
    write_shard,
)
from switchdit.errors import UserError
from switchdit.progress import progress
from switchdit.random_streams import random_stream

if TYPE_CHECKING:
    from switchdit.data.autoencoder import Autoencoder

PATIENCE = 3600  # seconds without a sign of life from the other processes, one a batch, until rank 0 gives up

# b = images of a batch, V = views, (C, h, w) = latent_shape, S = pixels of a side


def encode_images(autoencoder: Autoencoder, images: list[np.ndarray], flip: bool) -> np.ndarray:
    """uint8 images of (S, S, 3), b of them -> float32 (b, V, 2, C, h, w): [as is, flipped], [mean, std]."""
    import torch

    pixels = torch.from_numpy(np.stack(images)).to(autoencoder.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    views = torch.cat([pixels, pixels.flip(-1)]) if flip else pixels
    moments = torch.stack(autoencoder.encode(views), dim=1)
    return moments.unflatten(0, (-1, len(images))).transpose(0, 1).cpu().numpy()


def draw_samples(moments: np.ndarray, positions: list[int], first_shard: int) -> np.ndarray:
    """Moments (b, V, 2, C, h, w) -> one draw from each posterior, (b, V, 1, C, h, w).

    positions: of the images in the list of all; the noise depends on them and not on who encodes which batch.
    """
    mean, std = moments[:, :, 0], moments[:, :, 1]
    noise = [
        random_stream(first_shard, "posterior", position).standard_normal(mean.shape[1:], np.float32)
        for position in positions
    ]
    return (mean + std * np.stack(noise))[:, :, None]


def to_float16(moments: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Cast float32 moments (n, ...) of the images ``names`` to float16; `UserError` naming one that does not fit."""
    with np.errstate(over="ignore"):
        half = moments.astype(np.float16)
    finite = np.isfinite(half).reshape(len(half), -1).all(axis=1)
    if not finite.all():
        name = names[int(np.argmin(finite))]
        raise UserError(
            f"the latents of {name} exceed float16 (65504) or are not numbers; "
            "is the autoencoder sound, and --dtype float32?"
        )
    return half


@dataclass
class Job:
    """One extraction, as every process of it sees it.

    known: the manifest that is there tells of these images beside others; it is kept, and corrected in the end.
    """

    source: ImageSource
    out: Path
    plan: Plan
    skip_bad: bool
    rank: int
    world_size: int
    known: bool = False

    def __post_init__(self):
        source = self.source
        ranges = shard_ranges(len(source.names), self.plan.shard_size)
        self.shards = {self.plan.first_shard + i: files for i, files in enumerate(ranges)}
        self.digests = {
            i: digest_of(*(column[r.start : r.stop] for column in (source.names, source.sizes, source.stamps)))
            for i, r in self.shards.items()
        }

    def finished(self, index: int) -> dict[str, Any] | None:
        return finished_shard(self.out, index, self.plan, self.digests[index], self.skip_bad)

    @property
    def sign_of_life(self) -> Path:
        return self.out / f".rank_{self.rank:05d}.alive"


def encode_shards(job: Job, shards: list[int], autoencoder: Autoencoder, batch_size: int, workers: int) -> None:
    """Make the given shards one after the other; images are decoded ahead."""
    files = [position for index in shards for position in job.shards[index]]
    images = read_images(job.source, files, job.plan.image_size, workers, ahead=2 * batch_size + workers)
    beat = 0.0
    with contextlib.closing(images), progress(desc="encoding", total=len(files), unit="image") as bar:
        for index in shards:
            skipped: list[str] = []
            good = readable(zip(job.shards[index], images, strict=False), job.skip_bad, job.source, skipped)
            latents, num = np.empty((len(job.shards[index]), *job.plan.image_shape), np.float16), 0
            while batch := list(islice(good, batch_size)):
                positions, pixels = zip(*batch, strict=True)
                values = encode_images(autoencoder, list(pixels), job.plan.flip)
                if job.plan.stored == "sample":
                    values = draw_samples(values, positions, job.plan.first_shard)
                latents[num : num + len(batch)] = to_float16(values, [job.source.where(p) for p in positions])
                num += len(batch)
                bar.update(len(batch))
                if job.rank and time.monotonic() > beat + 2:
                    beat = time.monotonic()
                    with contextlib.suppress(FileNotFoundError):  # a process that failed removed the empty folder
                        job.sign_of_life.write_text(f"{bar.n}\n")
            bar.update(len(skipped))
            if not job.known and not job.plan.first_shard:  # the manifest tells of the shard that this one replaces
                (job.out / MANIFEST).unlink(missing_ok=True)
            write_shard(job.out, index, latents[:num], job.plan, job.digests[index], skipped)


def readable(
    loaded: Iterable, skip_bad: bool, source: ImageSource, skipped: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """Pass on what could be read; the rest goes to ``skipped``, or ends the run."""
    for position, image in loaded:
        if isinstance(image, np.ndarray):
            yield position, image
        elif skip_bad:
            skipped.append(source.names[position])
        else:
            raise UserError(
                f"cannot read the image {source.where(position)}: {image}; repair or remove it, or pass --skip-bad"
            )


def wait_for_others(job: Job) -> list[dict[str, Any]]:
    """Rank 0 waits until every shard is there and returns all sidecars; `UserError` after `PATIENCE` idle seconds."""
    sidecars = {index: job.finished(index) for index in job.shards}
    missing = [index for index, sidecar in sidecars.items() if sidecar is None]
    if not missing:
        return list(sidecars.values())
    last, since = None, time.monotonic()
    with progress(desc="waiting for the other processes", total=len(missing), unit="shard") as bar:
        while missing:
            time.sleep(0.3)
            for index in missing:
                sidecars[index] = job.finished(index)
            missing = [index for index in missing if sidecars[index] is None]
            bar.update(bar.total - len(missing) - bar.n)
            signs = [len(missing)]
            for path in sorted(job.out.glob(".rank_*.alive")):
                with contextlib.suppress(OSError):  # its process has just finished
                    signs.append(path.read_text())
            if signs != last:
                last, since = signs, time.monotonic()
            elif time.monotonic() > since + PATIENCE:
                raise UserError(
                    f"the other processes made no progress for {PATIENCE} s and {len(missing)} shards are missing; "
                    f"{CONTINUE}"
                )
    return list(sidecars.values())


def finish(
    job: Job, sidecars: list[dict[str, Any]], vae: dict[str, str], earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Write labels, names and manifest of the complete set of shards, after those of ``earlier``; return it."""
    source = job.source
    class_names = list(earlier["class_names"]) if earlier else []
    class_names += new_classes(source, class_names)
    ids = {name: label for label, name in enumerate(class_names)}
    skipped = {name for sidecar in sidecars for name in sidecar["skipped"]}
    kept = [i for i, name in enumerate(source.names) if name not in skipped]
    if not kept:
        raise UserError(f"not one image in {source.root} could be read")
    labels = np.array([ids[source.class_names[source.labels[i]]] for i in kept])
    names = [source.names[i] for i in kept]
    if earlier:
        data = LatentDataset(job.out)
        labels, names = np.concatenate([data.labels, labels]), [*data.names, *names]
    return write_manifest(job.out, job.plan, sidecars, labels, names, class_names, vae, earlier)


# ---------------------------------------------------------------------------------- beside what is there already


def job_for(job: Job, there: dict[str, Any] | None, append: bool) -> Job:
    """The job with the place of its shards beside those of the manifest ``there``, and whether that knows its images.

    Raises `UserError` when images would be stored twice or overwritten, or do not belong together.
    """
    if not there:
        check_same_plan(job.out, job.plan)
        return job
    check_same_settings(job.out, there, job.plan)
    alone, same_names = len(there["sources"]) == 1 and not append, []
    for entry in there["sources"]:
        if (entry["images"], entry["num_files"]) == (job.plan.images, job.plan.num_files):
            plan = replace(job.plan, first_shard=entry["first_shard"], shard_size=entry["shard_size"])
            same_names.append(replace(job, plan=plan, skip_bad=True, known=True))
    for known in same_names:
        if not changed_shards(job.out, known.digests):
            if alone:
                check_same_plan(job.out, job.plan)
            return job if alone else known
    for known in same_names:
        check_unchanged(job.out, known.digests)
    check_addition(job, append)
    job = replace(job, plan=replace(job.plan, first_shard=len(there["shards"])))
    check_same_plan(job.out, job.plan)
    return job


def check_addition(job: Job, append: bool) -> None:
    """Raise `UserError` unless the images can be, and are to be, added to the complete data set."""
    data, source = LatentDataset(job.out), job.source
    there = set(zip((data.class_names[label] for label in data.labels), data.names, strict=True))
    ours = zip((source.class_names[label] for label in source.labels), source.names, strict=True)
    twice = [name for label, name in ours if (label, name) in there]
    if twice:
        raise UserError(
            f"{len(twice)} of the {len(source.names)} images of {source.root} are in {job.out} already by class and "
            f"name, such as {twice[0]!r}; put the new images, under new names, into a folder of their own and --append "
            "that, or choose another output folder"
        )
    if not append:
        raise UserError(
            f"{job.out} holds {len(data)} images, but not those of {source.root} as they are now; pass --append to "
            "add them, or choose another output folder"
        )
    if ([UNCONDITIONAL] == source.class_names) != ([UNCONDITIONAL] == data.class_names):
        without, other = (source.root, job.out) if [UNCONDITIONAL] == source.class_names else (job.out, source.root)
        raise UserError(
            f"the images of {without} have no classes, those of {other} have; the classes of DATA come from its "
            "folders, or from --labels"
        )


def new_classes(source: ImageSource, there: Sequence[str]) -> list[str]:
    """Names of the classes of ``source`` that are not among those ``there``."""
    known = set(there)
    return [name for name in source.class_names if name not in known]
