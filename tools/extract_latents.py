"""Encode a folder of images into latent shards that training reads.

    python tools/extract_latents.py --data DIR --out DIR --vae PATH-OR-NAME [--image-size 256]
    deepspeed --num_accelerators 8 tools/extract_latents.py --data DIR --out DIR --vae PATH-OR-NAME

DIR has one sub-folder per class (class ids follow their sorted names), or images directly (one class). Images become
square as ADM makes them: RGB, halved with a box filter while the shorter side is at least twice the size, bicubic
to the size, centre crop; besides, EXIF orientation is honoured. For each image the posterior's mean and standard
deviation are stored, and those of the mirrored image. An interrupted run is continued by the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

# OpenMP's threads otherwise spin while they wait, which costs a factor of ten where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from switchdit.data.image_folder import TRANSFORM, ImageFolder, UnreadableImage, in_order, list_images, load_image
from switchdit.data.latent_shards import (
    CONTINUE,
    MANIFEST,
    Plan,
    check_same_plan,
    default_shard_size,
    digest_of,
    finished_shard,
    image_shape,
    owned_shards,
    shard_ranges,
    to_float16,
    write_manifest,
    write_shard,
)
from switchdit.errors import UserError, exit_on_user_error
from switchdit.progress import progress

if TYPE_CHECKING:
    from switchdit.data.autoencoder import Autoencoder

PATIENCE = 600  # seconds without a sign of life from the other processes until rank 0 gives up

# --------------------------------------------------------------------------------------------- the latents


def encode_images(autoencoder: Autoencoder, images: list[np.ndarray]) -> np.ndarray:
    """uint8 images of (S, S, 3), b of them -> float32 (b, 2, 2, C, h, w): [as is, flipped], [mean, std]."""
    import torch

    device = autoencoder.device
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    moments = torch.stack(autoencoder.encode(torch.cat([pixels, pixels.flip(-1)])), dim=1)
    return moments.unflatten(0, (2, len(images))).transpose(0, 1).cpu().numpy()


@dataclass
class Job:
    """One extraction, as every process of it sees it."""

    folder: ImageFolder
    out: Path
    plan: Plan
    skip_bad: bool
    rank: int
    world_size: int

    def __post_init__(self):
        self.shards = shard_ranges(len(self.folder.names), self.plan.shard_size)
        self.sources = [
            digest_of(self.names(i), self.folder.sizes[r.start : r.stop]) for i, r in enumerate(self.shards)
        ]

    def names(self, index: int) -> list[str]:
        return self.folder.names[self.shards[index].start : self.shards[index].stop]

    def finished(self, index: int) -> dict[str, Any] | None:
        return finished_shard(self.out, index, self.plan, self.sources[index], self.skip_bad)

    @property
    def sign_of_life(self) -> Path:
        return self.out / f".rank_{self.rank:05d}.alive"


def encode_shards(job: Job, shards: list[int], autoencoder: Autoencoder, batch_size: int, workers: int) -> None:
    """Make the given shards one after the other, decoding images ahead in threads (Pillow releases the lock)."""

    def load(name: str) -> tuple[str, np.ndarray | UnreadableImage]:
        try:
            return name, load_image(job.folder.root / name, job.plan.image_size)
        except UnreadableImage as problem:
            return name, problem

    everything = (name for index in shards for name in job.names(index))
    pool = ThreadPoolExecutor(workers)
    total, beat = sum(len(job.shards[index]) for index in shards), 0.0
    try:
        loaded = in_order(pool, load, everything, ahead=2 * batch_size + workers)
        with progress(desc="encoding", total=total, unit="image") as bar:
            for index in shards:
                skipped: list[str] = []
                good = _readable(islice(loaded, len(job.shards[index])), job, skipped)
                parts = [np.empty((0, 2, 2, *job.plan.latent_shape), np.float16)]
                while batch := list(islice(good, batch_size)):
                    names, images = zip(*batch, strict=True)
                    parts.append(to_float16(encode_images(autoencoder, list(images)), names))
                    bar.update(len(batch))
                    if job.rank and time.monotonic() > beat + 2:
                        beat = time.monotonic()
                        with contextlib.suppress(FileNotFoundError):  # a process that failed removed the empty folder
                            job.sign_of_life.write_text(f"{bar.n}\n")
                bar.update(len(skipped))
                write_shard(job.out, index, np.concatenate(parts), job.plan, job.sources[index], skipped)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _readable(loaded: Iterable, job: Job, skipped: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Pass on what could be read; the rest goes to ``skipped``, or ends the run."""
    for name, image in loaded:
        if isinstance(image, np.ndarray):
            yield name, image
        elif job.skip_bad:
            skipped.append(name)
        else:
            raise UserError(
                f"cannot read the image {job.folder.root / name}: {image}; repair or remove it, or pass --skip-bad"
            )


def wait_for_others(job: Job) -> list[dict[str, Any]]:
    """Rank 0 waits until every shard is there and returns all sidecars; `UserError` after `PATIENCE` idle seconds."""
    sidecars = [job.finished(index) for index in range(len(job.shards))]
    missing = [index for index, sidecar in enumerate(sidecars) if sidecar is None]
    if not missing:
        return sidecars
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
                with contextlib.suppress(FileNotFoundError):  # its process has just finished
                    signs.append(path.read_text())
            if signs != last:
                last, since = signs, time.monotonic()
            elif time.monotonic() > since + PATIENCE:
                raise UserError(
                    f"the other processes made no progress for {PATIENCE} s and {len(missing)} shards are missing; "
                    f"{CONTINUE}"
                )
    return sidecars


def finish(job: Job, sidecars: list[dict[str, Any]], vae: dict[str, str]) -> dict[str, Any]:
    """Write labels and manifest of the complete set of shards; return the manifest."""
    skipped = {name for sidecar in sidecars for name in sidecar["skipped"]}
    images = zip(job.folder.names, job.folder.labels, strict=True)
    kept = [(name, label) for name, label in images if name not in skipped]
    if not kept:
        raise UserError(f"not one image in {job.folder.root} could be read")
    names, labels = zip(*kept, strict=True)
    for path in job.out.glob(".rank_*.alive"):  # also of a killed run with more processes
        path.unlink(missing_ok=True)
    return write_manifest(job.out, job.plan, sidecars, np.array(labels), names, job.folder.class_names, vae)


# ---------------------------------------------------------------------------------------------- the program


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the latents into")
    parser.add_argument("--vae", required=True, help="folder of an AutoencoderKL, or a hub name")
    parser.add_argument("--image-size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default 32)")
    parser.add_argument("--shard-size", type=int, help="images in a shard file (default: as many as make 256 MB)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="arithmetic of the encoder")
    parser.add_argument("--workers", type=int, default=min(8, cores), help="threads that decode images, per process")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    args = parser.parse_args(argv)
    for option in ("image_size", "batch_size", "shard_size", "workers"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1")
    data, out = args.data.resolve(), args.out.resolve()
    if out == data or data in out.parents:
        raise UserError(f"--out {args.out} lies in --data {args.data}; its files would be taken for images later")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {args.out} is a file, not a folder")
    return args


def load_for_rank(args: argparse.Namespace) -> Autoencoder:
    """The autoencoder on this process's device, set up to give the same latents on every run."""
    import torch

    from switchdit.data.autoencoder import load_autoencoder

    device = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:  # the processes of this node share its cores
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        torch.set_num_threads(max(1, torch.get_num_threads() // local))
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', args.local_rank)) % torch.cuda.device_count()}"
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # float32 shall mean float32; bfloat16 is the fast choice
        torch.backends.cuda.matmul.allow_tf32 = False
    return load_autoencoder(args.vae, device, getattr(torch, args.dtype))


@contextlib.contextmanager
def own_mistakes_told(rank: int) -> Iterator[None]:
    """Only rank 0 prints mistakes that all processes meet; here each one meets its own."""
    try:
        yield
    except UserError as problem:
        if rank:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        raise


def extract(args: argparse.Namespace) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    say = print if rank == 0 else lambda *_, **__: None
    folder = list_images(args.data)
    autoencoder = load_for_rank(args)
    latent_shape = autoencoder.latent_shape(args.image_size)
    plan = Plan(
        images=digest_of(folder.names),
        num_files=len(folder.names),
        image_size=args.image_size,
        latent_shape=latent_shape,
        shard_size=args.shard_size or default_shard_size(image_shape(latent_shape, True, "moments")),
        encoder_dtype=args.dtype,
        vae_sha256=autoencoder.identity["sha256"],
        scale_factor=autoencoder.scale_factor,
        transform=TRANSFORM,
    )
    check_same_plan(args.out, plan)
    job = Job(folder, args.out, plan, args.skip_bad, rank, world_size)

    done = [index for index in range(len(job.shards)) if job.finished(index)]
    if len(done) == len(job.shards) and (args.out / MANIFEST).is_file():
        say(f"already complete: {args.out / MANIFEST}")
        return
    say(
        f"{len(folder.names)} images, {len(folder.class_names)} classes, from {args.data} to {args.out}: "
        f"{args.image_size} pixels -> latents {plan.latent_shape} of {args.vae} in {args.dtype} "
        f"on {autoencoder.device.type} x {world_size}, {len(job.shards)} shards"
        + (f", {len(done)} of them already there" if done else ""),
        flush=True,
    )
    if world_size > len(job.shards):
        say(f"note: {world_size} processes but {len(job.shards)} shards; a smaller --shard-size would busy all")
    if rank == 0:
        (args.out / MANIFEST).unlink(missing_ok=True)  # until it is true again
    started = time.monotonic()
    with own_mistakes_told(rank):
        args.out.mkdir(parents=True, exist_ok=True)
        todo = [index for index in owned_shards(len(job.shards), rank, world_size) if index not in set(done)]
        try:
            encode_shards(job, todo, autoencoder, args.batch_size, args.workers)
            job.sign_of_life.unlink(missing_ok=True)
        except BaseException:
            job.sign_of_life.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                args.out.rmdir()  # when there is nothing in it
            raise
    if rank:
        return
    sidecars = wait_for_others(job)
    seconds = time.monotonic() - started
    manifest = finish(job, sidecars, autoencoder.identity)
    encoded = sum(sidecar["num"] for index, sidecar in enumerate(sidecars) if index not in set(done))
    say(
        f"wrote {args.out / MANIFEST}: {manifest['num_images']} images in {len(job.shards)} shards, "
        f"{len(manifest['skipped'])} skipped; {encoded} encoded in {seconds:.1f} s, {encoded / seconds:.1f} images/s"
    )


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        extract(args)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\ninterrupted; finished shards are kept in {args.out}: {CONTINUE}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a launcher stops its processes with SIGTERM
    main()
