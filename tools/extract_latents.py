"""Encode a folder, a tar or a zip of images into latent shards that training reads.

    python tools/extract_latents.py --data DATA --out DIR --vae PATH-OR-NAME [--image-size 256]
    deepspeed --num_accelerators 8 tools/extract_latents.py --data DATA --out DIR --vae PATH-OR-NAME
    python tools/extract_latents.py --out DIR --verify | --stats
    python tools/extract_latents.py --data DATA --vae PATH-OR-NAME --preview FILE.png

DATA is a folder, an uncompressed .tar (also ImageNet's tar of tars) or a .zip, with one sub-folder per class (class ids
follow their sorted names), or with images directly (one class), or with classes said by --labels. Images become
square as ADM makes them: RGB, halved with a box filter while the shorter side is at least twice the size, bicubic
to the size, centre crop; besides, EXIF orientation is honoured. For each image the posterior's mean and standard
deviation are stored (--sample: one draw from it), and those of the mirrored image (unless --no-flip). An interrupted
run is continued by the same command; --append adds the images of another DATA to a complete DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

# OpenMP's threads otherwise spin while they wait, which costs a factor of ten where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from switchdit.data.image_pixels import TRANSFORM, read_images
from switchdit.data.image_source import ImageSource, list_images
from switchdit.data.latent_conflicts import changed_shards
from switchdit.data.latent_shards import (
    MANIFEST,
    Plan,
    damaged_list,
    damaged_shard,
    default_shard_size,
    digest_of,
    how_to_complete,
    image_shape,
    lists_shards,
    owned_shards,
    read_manifest,
    relist_shards,
    remove_outdated,
    unlisted_shards,
)
from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import check_writable, make_folder
from tools.command_line import interrupt_on_sigterm, told_by_rank_0, told_when_stopped
from tools.extraction import Job, encode_shards, finish, job_for, new_classes, readable, wait_for_others

if TYPE_CHECKING:
    from switchdit.data.autoencoder import Autoencoder

MOST_WORKERS = 16  # a device is kept busy by fewer; more would only take memory
PREVIEWED = 16  # images
# What a mode that extracts nothing takes beside its own option.
TAKEN = {
    "verify": ("out",),
    "stats": ("out",),
    "preview": ("data", "vae", "labels", "unlabeled", "image_size", "dtype", "skip_bad"),
}

# ---------------------------------------------------------------------------------------------- the program


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder, .tar or .zip of images")
    parser.add_argument("--out", type=Path, help="folder to write the latents into")
    parser.add_argument("--vae", help="folder of an AutoencoderKL, or a hub name")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--labels", type=Path, help="CSV (file,label) or JSON that says the class of each image")
    classes.add_argument("--unlabeled", action="store_true", help="all images are of one class, whatever their folder")
    parser.add_argument("--image-size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default 32)")
    parser.add_argument("--shard-size", type=int, help="images in a shard file (default: as many as make 256 MB)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="arithmetic of the encoder")
    parser.add_argument("--sample", action="store_true", help="store one draw from the posterior, not mean and std")
    parser.add_argument("--no-flip", action="store_true", help="leave the mirrored images out")
    parser.add_argument("--workers", type=int, help="processes that decode images, for each device; 0: none")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--append", action="store_true", help="add the images to the complete data set in --out")
    modes.add_argument("--verify", action="store_true", help="only check the files in --out against their checksums")
    modes.add_argument("--stats", action="store_true", help="only print mean and std of the latents in --out")
    modes.add_argument("--preview", type=Path, metavar="FILE.png", help="only draw some images and what the VAE keeps")
    args = told_by_rank_0(parser).parse_args(argv)
    mode = next((mode for mode in TAKEN if getattr(args, mode)), None)
    needed = TAKEN[mode][:2] if mode else ("data", "out", "vae")
    missing = [f"--{option}" for option in needed if getattr(args, option) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see --help")
    given = [option for option, value in vars(args).items() if value != parser.get_default(option)]
    if mode and (idle := [o for o in given if o not in (*TAKEN[mode], mode, "local_rank")]):
        raise UserError(f"--{mode} extracts nothing; it does not take {', '.join(map(written, idle))}")
    for option, least in {"image_size": 1, "batch_size": 1, "shard_size": 1, "workers": 0}.items():
        if getattr(args, option) is not None and getattr(args, option) < least:
            raise UserError(f"{written(option)} {getattr(args, option)} must be at least {least}")
    if args.workers is None:
        args.workers = min(MOST_WORKERS, max(1, cores() // processes_here()))
    if args.out and args.data and args.data.resolve() in (args.out.resolve(), *args.out.resolve().parents):
        raise UserError(f"--out {args.out} lies in --data {args.data}; its files would be taken for images later")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, not a folder")
    if args.preview and args.preview.suffix != ".png":
        raise UserError(f"--preview {args.preview} must be a file that ends in .png")
    if args.preview and args.preview.is_dir():
        raise UserError(f"--preview {args.preview} is a folder, not a file")
    if mode in (None, "preview"):
        check_writable(args.preview or args.out, "--preview" if args.preview else "--out")
    return args


def written(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """How many processes the launcher started on this machine; they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def load_for_rank(args: argparse.Namespace) -> Autoencoder:
    """The autoencoder on this process's device, set up to give the same latents on every run.

    How sums are split between threads changes their last bits: on a CPU each process computes with one.
    """
    import torch

    from switchdit.data.autoencoder import load_autoencoder

    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', args.local_rank)) % torch.cuda.device_count()}"
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # float32 shall mean float32; bfloat16 is the fast choice
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(1)
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


def make_plan(args: argparse.Namespace, source: ImageSource, autoencoder: Autoencoder) -> Plan:
    latent_shape = autoencoder.latent_shape(args.image_size)
    flip, stored = not args.no_flip, "sample" if args.sample else "moments"
    return Plan(
        images=digest_of(source.identities()),
        num_files=len(source.names),
        image_size=args.image_size,
        latent_shape=latent_shape,
        shard_size=args.shard_size or default_shard_size(image_shape(latent_shape, flip, stored)),
        encoder_dtype=args.dtype,
        vae_sha256=autoencoder.identity["sha256"],
        scale_factor=autoencoder.scale_factor,
        transform=TRANSFORM,
        flip=flip,
        stored=stored,
    )


def is_complete(job: Job, there: dict[str, Any], done: list[dict[str, Any]]) -> bool:
    """Whether nothing is left to do; `UserError` when what is damaged cannot be repaired from these images."""
    if len(done) < len(job.shards) or not lists_shards(there, done) or not (job.out / MANIFEST).is_file():
        return False
    damaged = damaged_list(job.out, there)
    if damaged and job.known:
        raise UserError(
            f"{damaged} is missing or damaged; delete {job.out / MANIFEST}, then {how_to_complete(job.out)}"
        )
    shard = damaged_shard(job.out, there)
    if shard and not damaged:
        raise UserError(
            f"{shard} is missing or damaged, and not made of the images of {job.source.root}; the command that made "
            "it, with its --data, repairs it"
        )
    return not damaged


def first_line(args: argparse.Namespace, job: Job, done: int, classes: list[str], autoencoder: Autoencoder) -> str:
    """What is done. done: shards that need not be made. classes: the new ones, where images are appended."""
    plan, source = job.plan, job.source
    one_thread = autoencoder.model is not None and autoencoder.device.type == "cpu" and processes_here() < cores()
    return (
        f"{len(source.names)} images, {len(source.class_names)} classes, from {args.data} to {args.out}: "
        f"{args.image_size} pixels -> latents {plan.latent_shape} of {args.vae} in {args.dtype} "
        f"on {autoencoder.device.type} x {job.world_size}"
        + (" (one thread each: on a CPU take NPROC = cores)" if one_thread else "")
        + f", {len(job.shards)} shards"
        + (f" after {plan.first_shard}" if plan.first_shard else "")
        + (f", {done} of them already there" if done else "")
        + (f"; new classes: {', '.join(classes) or 'none'}" if args.append and not job.known else "")
    )


def notes(job: Job) -> Iterator[str]:
    """What the user should know before the work begins."""
    if job.world_size > len(job.shards):
        yield f"{job.world_size} processes but {len(job.shards)} shards; a smaller --shard-size would busy all"
    changed = changed_shards(job.out, job.digests)
    if changed:
        yield (
            f"{len(changed)} shards there are made anew: they are of files that have changed since, by size or date, "
            "or of others of the same names"
        )


def extract(args: argparse.Namespace) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    say = print if rank == 0 else lambda *_, **__: None
    there = read_manifest(args.out) if args.append or (args.out / MANIFEST).is_file() else None
    source = list_images(args.data, args.labels, args.unlabeled)
    autoencoder = load_for_rank(args)
    plan = make_plan(args, source, autoencoder)
    job = job_for(Job(source, args.out, plan, args.skip_bad, rank, world_size), there, args.append)

    done = {index: sidecar for index in job.shards if (sidecar := job.finished(index))}
    if there and is_complete(job, there, list(done.values())):
        if rank == 0:
            remove_outdated(args.out, there)
        say(f"already complete: {args.out / MANIFEST}")
        return
    classes = new_classes(source, there["class_names"]) if there else []
    say(first_line(args, job, len(done), classes, autoencoder), flush=True)
    for note in notes(job):
        say(f"note: {note}", flush=True)
    started = time.monotonic()
    with own_mistakes_told(rank):
        make_folder(args.out)
        mine = [list(job.shards)[i] for i in owned_shards(len(job.shards), rank, world_size)]
        try:
            encode_shards(
                job, [index for index in mine if index not in done], autoencoder, args.batch_size, args.workers
            )
            job.sign_of_life.unlink(missing_ok=True)
        except BaseException:
            job.sign_of_life.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                args.out.rmdir()  # when there is nothing in it
            raise
    if rank:
        return
    sidecars = wait_for_others(job)
    for path in args.out.glob(".rank_*.alive"):  # also of a killed run with more processes
        path.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    if job.known:
        manifest = relist_shards(args.out, there, sidecars)
    else:
        manifest = finish(job, sidecars, autoencoder.identity, there if args.append else None)
    encoded = sum(sidecar["num"] for sidecar in sidecars if sidecar["file"] not in {d["file"] for d in done.values()})
    say(
        f"wrote {args.out / MANIFEST}: {manifest['num_images']} images in {len(manifest['shards'])} shards, "
        f"{len(manifest['skipped'])} skipped; {encoded} encoded in {seconds:.1f} s, {encoded / seconds:.1f} images/s"
    )
    if others := unlisted_shards(args.out, manifest):
        say(
            f"note: the manifest does not list {len(others)} shards that lie there, such as {others[0]}; run the "
            "--append that made them again, or delete them"
        )


def preview(args: argparse.Namespace) -> None:
    from tools.latent_reports import write_preview

    source = list_images(args.data, args.labels, args.unlabeled)
    autoencoder = load_for_rank(args)
    autoencoder.latent_shape(args.image_size)
    positions = np.unique(np.linspace(0, len(source.names) - 1, PREVIEWED).round().astype(int)).tolist()
    loaded = read_images(source, positions, args.image_size, workers=0, ahead=0)
    shown = dict(readable(zip(positions, loaded, strict=True), args.skip_bad, source, []))
    if not shown:
        raise UserError(f"not one of the images looked at in {source.root} could be read")
    write_preview(list(shown.values()), [source.names[p] for p in shown], autoencoder, args.preview)


def report(args: argparse.Namespace) -> None:
    """The modes that extract nothing, in the first process alone."""
    from tools.latent_reports import print_statistics, verify

    if int(os.environ.get("RANK", "0")):
        return
    if args.preview:
        preview(args)
    else:
        (verify if args.verify else print_statistics)(args.out)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    reports = args.verify or args.stats or args.preview
    with told_when_stopped(None if reports else args.out):
        (report if reports else extract)(args)


if __name__ == "__main__":
    interrupt_on_sigterm()
    main()
