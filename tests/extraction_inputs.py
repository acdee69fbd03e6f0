"""Photographs of several kinds and a tiny autoencoder, for tests of extraction."""

import contextlib
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

CLASSES = {"ant": 9, "bee": 10, "cow": 4}  # folder -> images


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_autoencoder(path):
    """An AutoencoderKL of a few thousand random weights, 4 pixels to a cell."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(path)
    return path


def write_photos(root, classes=CLASSES, seed=0, first=0):
    """PNG and JPEG files of as many sizes, numbered from ``first``, some in folders below that of their class."""
    for name, count in classes.items():
        (root / name / "deeper").mkdir(parents=True)
        for index in range(first, first + count):
            seed += 1
            folder = root / name / ("deeper" if index % 3 == 0 else "")
            Image.fromarray(noise(16 + seed, 50 - seed, seed)).save(folder / f"{index}{('.png', '.JPEG')[index % 2]}")
    return root


def as_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, folder.name)
    return path


def as_zip(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def content(folder):
    """Every file of an output folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_sidecars(files):
    """Of `content`: sidecars tell the dates of files, of which archives keep others."""
    return {name: data for name, data in files.items() if not (name.startswith("shard") and name.endswith(".json"))}


@contextlib.contextmanager
def small_disk(path, options):
    """A file system of its own in the folder ``path``; the test is skipped where none can be mounted."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def arguments(data, out, vae, *more):
    """Small images and shards of four; decoded by the process itself, which starts faster."""
    fixed = ["--image-size", "16", "--shard-size", "4", "--batch-size", "3", "--workers", "0"]
    return ["--data", str(data), "--out", str(out), "--vae", str(vae), *fixed, *more]
