"""Write a folder, tar or zip of images as one .npz in ADM's format: what metrics take as a reference or as samples.

    python tools/pack_images.py --data DATA --out ref.npz --image-size 256

DATA has one sub-folder per class, or images directly. Images become square as in tools/extract_latents.py: RGB, box
halving, bicubic, centre crop. OUT holds arr_0 (N, S, S, 3) uint8, in the order of classes and file names, and arr_1
(N,) int64 labels when there are classes. It appears when it is whole, and never needs more memory than a few images.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import zipfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import atomic_write
from switchdit.progress import progress

# N = images, S = pixels of a side

READ_AHEAD = 64  # images
LARGEST_SIDE = 4096


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder, .tar or .zip of images, by class or loose")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes")
    args = parser.parse_args(argv)
    if not 1 <= args.image_size <= LARGEST_SIDE:
        raise UserError(f"--image-size is {args.image_size}; it must be from 1 to {LARGEST_SIDE}")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")
    if args.out.suffix != ".npz" or args.out.is_dir():
        raise UserError(f"--out is '{args.out}'; it must be a file that ends in .npz")
    count, classes = pack_images(args.data, args.out, args.image_size, args.workers)
    labels = f", labels of {classes} classes" if classes else ""
    print(f"wrote {args.out}: {count} images of {args.image_size} x {args.image_size}{labels}")


def pack_images(data: Path, out: Path, image_size: int, workers: int = 0) -> tuple[int, int]:
    """Write ``out`` and return the numbers of images and of classes (0: no labels were written).

    Raises `UserError`, naming the file, for an image that cannot be read; ``out`` is then as it was before.
    """
    import numpy as np

    from switchdit.data.image_pixels import UnreadableImage, read_images
    from switchdit.data.image_source import UNCONDITIONAL, list_images

    source = list_images(data)
    shape = (len(source.names), image_size, image_size, 3)
    has_classes = source.class_names != [UNCONDITIONAL]
    images = read_images(source, range(shape[0]), image_size, workers, READ_AHEAD)
    with (
        contextlib.closing(images),
        atomic_write(out) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for i, image in enumerate(progress(images, desc=f"packing {data.name}", total=shape[0], unit="image")):
                if isinstance(image, UnreadableImage):
                    raise UserError(f"image {source.where(i)} cannot be read ({image}); mend or remove it")
                member.write(np.ascontiguousarray(image))
        if has_classes:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(source.labels, np.int64), allow_pickle=False)
    return len(source.names), len(source.class_names) if has_classes else 0


if __name__ == "__main__":
    main()
