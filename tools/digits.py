"""Write the handwritten digits that ship inside scikit-learn as an image folder: ``OUT/0/0000.png`` and so on.

1,797 scans of 8 x 8 pixels with 17 grey levels (0..16), ten classes; the UCI "Optical Recognition of Handwritten
Digits" test set. They are written as they are, 8 x 8: the bicubic enlargement of the extraction makes smooth 32 x 32
images of them.

    python tools/digits.py --out runs/demo/images
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
from PIL import Image

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import write_json

DONE = "digits.json"  # marks a folder as ours


def write_digits(out: Path) -> int:
    """Write the image folder, whole or not at all, and return the number of images; a complete one is left alone."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as problem:
        raise UserError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from problem
    digits = load_digits()
    names = [f"{label}/{index:04d}.png" for index, label in enumerate(digits.target)]
    ours = (out / DONE).is_file()
    if ours and all((out / name).is_file() for name in names):
        return len(names)
    if not ours and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} holds other things; choose a new folder for the digits")
    levels = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)  # (1797, 8, 8)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        for label in range(10):
            (partial / str(label)).mkdir(parents=True)
        for name, image in zip(names, levels, strict=True):
            Image.fromarray(image).save(partial / name)
        write_json(partial / DONE, {"num_images": len(names), "source": "sklearn.datasets.load_digits"})
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(names)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the image folder to write")
    out = parser.parse_args(argv).out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    print(f"{write_digits(out)} digits in 10 classes are in {out}")


if __name__ == "__main__":
    main()
