"""Write latents one file an image, as fast-DiT and what derives from it read them.

    python tools/export_latents.py --latents DIR --to DIR [--seed 0]

--to holds imagenet256_features/NUMBER.npy, float32 (1, C, h, w), and imagenet256_labels/NUMBER.npy, int64 (1,), where
256 is the size of the images. Each latent is one draw from its posterior, which depends on the seed and the image
alone, times the autoencoder's scale factor. Mirrored images are left out. The folder appears when it is whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

import numpy as np

from switchdit.data.latent_dataset import LatentDataset
from switchdit.data.npy_header import write_npy
from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import check_writable, make_folder, sync_directory
from switchdit.progress import progress, say
from switchdit.random_streams import random_stream
from tools.command_line import check_one_process, told_by_rank_0

BLOCK = 256  # images at a time


def export(data: LatentDataset, to: Path, seed: int) -> None:
    """Write all images of ``data`` into the folder ``to``; `UserError` when there is something in it."""
    to = to.resolve()  # of a link to an empty folder, the folder
    check_writable(to.parent if to.exists() else to, "--to")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to {to} is {'a folder with files in it' if to.is_dir() else 'a file'}; give a new folder")
    make_folder(to.parent)
    partial = to.parent / f".{to.name}.{os.getpid()}.partial"
    try:
        features, labels = (partial / f"imagenet{data.image_size}_{kind}" for kind in ("features", "labels"))
        features.mkdir(parents=True)
        labels.mkdir()
        with progress(desc="exporting", total=len(data), unit="image") as bar:
            for start in range(0, len(data), BLOCK):
                indices = range(start, min(start + BLOCK, len(data)))
                for i, latent in zip(indices, draw(data, indices, seed), strict=True):
                    for folder, values in ((features, latent[None]), (labels, data.labels[i : i + 1])):
                        with open(folder / f"{i}.npy", "wb") as file:
                            write_npy(file, values)
                bar.update(len(indices))
        os.sync()  # one for all: a sync for each of a million files would take hours
        os.replace(partial, to)
        sync_directory(to.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def draw(data: LatentDataset, indices: range, seed: int) -> np.ndarray:
    """Scaled draws from the posteriors of the given images, float32 (n, C, h, w)."""
    mean, std = data.moments(np.array(indices), np.zeros(len(indices), bool))
    if data.stored == "moments":
        for i, index in enumerate(indices):
            noise = random_stream(seed, "export latents", index).standard_normal(data.latent_shape, np.float32)
            mean[i] += std[i] * noise
    return mean * np.float32(data.scale_factor)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, required=True, help="folder of tools/extract_latents.py")
    parser.add_argument("--to", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    args = told_by_rank_0(parser).parse_args(argv)
    check_one_process("tools/export_latents.py")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    data = LatentDataset(args.latents)
    export(data, args.to, args.seed)
    say(f"wrote {args.to}: {len(data)} latents {data.latent_shape} in 2 x {len(data)} files")


if __name__ == "__main__":
    main()
