"""Import latents that another project extracted into shards that training reads.

    python tools/import_latents.py --from DIR-OR-ZIP --out DIR --vae PATH-OR-NAME [--format auto|fast-dit|edm2]

fast-dit: DIR/imagenet256_features/NUMBER.npy, float32 (1, C, h, w), one draw from the posterior of each image, scaled;
and DIR/imagenet256_labels/NUMBER.npy, one integer. Other names before _features and _labels will do.
edm2 (EDM2's and REPA's): a folder or a zip file of .npy files, float32 (2C, h, w), the posterior's means, then its
standard deviations, unscaled; and dataset.json, {"labels": [["00000/img-mean-std-00000000.npy", CLASS], ...]} or
{"labels": null}.

There are no mirrored images in either: train with data.horizontal_flip: false. The VAE is the one that made the
latents; given as a folder, its weights are known later, given as a hub name, only its name is (nothing is downloaded).
An interrupted import is continued by the same command.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

import numpy as np

from switchdit.data.latent_conflicts import check_same_plan, check_unchanged
from switchdit.data.latent_dataset import UNKNOWN
from switchdit.data.latent_shards import (
    MANIFEST,
    Plan,
    default_shard_size,
    digest_of,
    finished_shard,
    image_shape,
    shard_ranges,
    write_manifest,
    write_shard,
)
from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import check_writable
from switchdit.progress import progress, say
from tools.command_line import check_one_process, interrupt_on_sigterm, told_by_rank_0, told_when_stopped
from tools.latent_sources import FORMATS, Source, in_chunks, open_source

SD_SCALE_FACTOR, SD_DOWNSAMPLING = 0.18215, 8  # of Stable Diffusion's autoencoders
FLOAT16_END = 65520.0  # the first number that rounds to infinity


@dataclass(frozen=True)
class Vae:
    """What must be known of the autoencoder that made the latents."""

    identity: dict[str, str]
    scale_factor: float
    latent_channels: int | None
    downsampling: int


def describe_vae(name: str, scale_factor: float | None) -> Vae:
    """From its folder; of a hub name the name, and Stable Diffusion's numbers. Raises `UserError`."""
    from switchdit.data.autoencoder import is_hub_name, load_autoencoder

    if Path(name).is_dir():
        found = load_autoencoder(name)
        if scale_factor not in (None, found.scale_factor):
            raise UserError(f"--scale-factor is {scale_factor:g}, but that of --vae {name} is {found.scale_factor:g}")
        return Vae(found.identity, found.scale_factor, found.latent_channels, found.downsampling)
    if not is_hub_name(name):
        raise UserError(f"--vae {name} is neither a folder nor a hub name such as stabilityai/sd-vae-ft-ema")
    return Vae({"name": name, "sha256": UNKNOWN}, scale_factor or SD_SCALE_FACTOR, None, SD_DOWNSAMPLING)


def make_plan(source: Source, vae: Vae, image_size: int | None, shard_size: int | None) -> Plan:
    """Raises `UserError` when latents, autoencoder and ``image_size`` do not fit together."""
    channels, height, width = source.latent_shape
    if height != width:
        raise UserError(f"{source.where} holds latents of {height} x {width}; only square ones can be trained on")
    if vae.latent_channels not in (None, channels):
        raise UserError(
            f"{source.where} holds latents of {channels} channels, --vae {vae.identity['name']} makes "
            f"{vae.latent_channels}"
        )
    if image_size not in (None, vae.downsampling * height):
        raise UserError(
            f"--image-size is {image_size}, but {source.where} holds latents of {height} x {width}, which "
            f"--vae {vae.identity['name']} makes of {vae.downsampling * height} pixels"
        )
    shape = image_shape(source.latent_shape, False, source.stored)
    return Plan(
        images=digest_of(source.names, source.labels.tolist()),
        num_files=len(source.names),
        image_size=vae.downsampling * height,
        latent_shape=source.latent_shape,
        shard_size=shard_size or default_shard_size(shape),
        encoder_dtype=UNKNOWN,
        vae_sha256=vae.identity["sha256"],
        scale_factor=vae.scale_factor,
        transform=f"imported from {source.format}",
        flip=False,
        stored=source.stored,
        vae_name=vae.identity["name"] if vae.identity["sha256"] == UNKNOWN else None,
    )


def check_classes(labels: np.ndarray, asked: int | None) -> int:
    """Number of classes: ``asked``, or as many as the labels need."""
    needed = int(labels.max()) + 1
    if asked is not None and asked < needed:
        raise UserError(f"--num-classes is {asked}, but the labels go up to {needed - 1}")
    if asked is None and needed > len(labels):
        raise UserError(f"{len(labels)} images have labels up to {needed - 1}; if that is so, give --num-classes")
    return asked or needed


def read_shard(source: Source, files: range, plan: Plan, bar) -> np.ndarray:
    """float16 (n, 1, K, C, h, w), unscaled, of the given files; `UserError` naming one that cannot be used."""
    moments = np.empty((len(files), *plan.image_shape), np.float16)
    for chunk, parts in in_chunks(lambda i: to_moments(source.read(i), source, plan, source.names[i]), files):
        moments[chunk.start - files.start : chunk.stop - files.start] = parts
        bar.update(len(chunk))
    return moments


def to_moments(values: np.ndarray, source: Source, plan: Plan, name: str) -> np.ndarray:
    """A file's float32 values -> float16 (1, K, C, h, w), unscaled."""
    if source.scaled:
        values = values / np.float32(plan.scale_factor)
    values = values.reshape(plan.image_shape)
    if not (values.min() > -FLOAT16_END and values.max() < FLOAT16_END):  # also false of NaN
        raise UserError(f"{source.where / name} holds values that are no numbers or exceed float16 (65504)")
    if source.stored == "moments" and values[:, 1].min() < 0:
        raise UserError(f"{source.where / name} holds negative standard deviations in its second half")
    return values.astype(np.float16)


def import_latents(args: argparse.Namespace) -> None:
    vae = describe_vae(args.vae, args.scale_factor)
    source = open_source(args.source, args.format)
    num_classes = check_classes(source.labels, args.num_classes)
    plan = make_plan(source, vae, args.image_size, args.shard_size)
    check_same_plan(args.out, plan)
    shards = shard_ranges(len(source.names), plan.shard_size)
    columns = (source.names, source.sizes, source.stamps)
    digests = [digest_of(*(column[r.start : r.stop] for column in columns)) for r in shards]
    if (args.out / MANIFEST).is_file():
        check_unchanged(args.out, dict(enumerate(digests)))
    sidecars = [finished_shard(args.out, i, plan, digest, False) for i, digest in enumerate(digests)]
    missing = [i for i, sidecar in enumerate(sidecars) if sidecar is None]
    say(
        f"{len(source.names)} latents {source.latent_shape} ({source.stored}), {num_classes} classes, "
        f"from {source.where} ({source.format}) to {args.out}: {len(shards)} shards"
        + (f", {len(shards) - len(missing)} of them already there" if len(missing) < len(shards) else "")
    )
    total = sum(len(shards[i]) for i in missing)
    with progress(desc="importing", total=total, unit="image") as bar:
        for i in missing:
            moments = read_shard(source, shards[i], plan, bar)
            (args.out / MANIFEST).unlink(missing_ok=True)  # until it is true again
            sidecars[i] = write_shard(args.out, i, moments, plan, digests[i])
    classes = [str(c) for c in range(num_classes)]
    write_manifest(args.out, plan, sidecars, source.labels, source.names, classes, vae.identity)
    say(f"wrote {args.out / MANIFEST}: {len(source.names)} images, {total} of them imported now")


# ---------------------------------------------------------------------------------------------- the program


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder or zip file of latents")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the shards into")
    parser.add_argument("--vae", required=True, help="the autoencoder that made them: its folder, or its hub name")
    parser.add_argument("--format", choices=["auto", *FORMATS], default="auto", help="default: by what lies there")
    parser.add_argument(
        "--image-size", type=int, help="pixels, checked (default: 8 times the latents' width, or by the VAE's folder)"
    )
    parser.add_argument(
        "--scale-factor", type=float, help="of the autoencoder (default: by the VAE's folder, of a name 0.18215)"
    )
    parser.add_argument("--num-classes", type=int, help="default: the highest label and one")
    parser.add_argument("--shard-size", type=int, help="images in a shard file (default: as many as make 256 MB)")
    args = told_by_rank_0(parser).parse_args(argv)
    check_one_process("tools/import_latents.py")
    for option in ("image_size", "scale_factor", "num_classes", "shard_size"):
        value = getattr(args, option)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be above 0")
    source, out = args.source.resolve(), args.out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"--out {args.out} lies in --from {args.source}; its files would be taken for latents later")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {args.out} is a file, not a folder")
    check_writable(args.out, "--out")
    return args


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with told_when_stopped(args.out):
        import_latents(args)


if __name__ == "__main__":
    interrupt_on_sigterm()
    main()
