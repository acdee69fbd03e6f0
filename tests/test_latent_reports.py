"""Reports on latents: damage is named, statistics are those of what training draws, previews show what they say."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from switchdit.data import latent_shards as shards
from switchdit.data.autoencoder import PixelAutoencoder
from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError
from tools import latent_reports as reports

SHAPE = (2, 3, 4)


def write(out, values, flip, stored, shard_size=300, scale=0.5):
    """values: (N, V, K, *SHAPE)."""
    plan = shards.Plan("d", len(values), 8, SHAPE, shard_size, "float32", "v" * 64, scale, "t", flip, stored)
    parts = np.split(values.astype(np.float16), range(shard_size, len(values), shard_size))
    sidecars = [shards.write_shard(out, i, part, plan, "s") for i, part in enumerate(parts)]
    names = [str(i) for i in range(len(values))]
    labels = np.zeros(len(values), int)
    shards.write_manifest(out, plan, sidecars, labels, names, ["a"], {"name": "n", "sha256": "v" * 64})
    return LatentDataset(out)


def test_verify_says_what_was_checked_or_what_is_damaged(tmp_path, capsys):
    write(tmp_path, np.zeros((700, 1, 1, *SHAPE)), False, "sample")
    reports.verify(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".npy" or "names" in path.name)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path} is whole: 700 images, 5 files, {size} bytes checked in ")
    with open(tmp_path / "shard_00001.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"\1")
    with pytest.raises(UserError, match=r"shard_00001\.npy is damaged"):
        reports.verify(tmp_path)


@pytest.mark.parametrize(
    ("flip", "stored"), [(True, "moments"), (False, "moments"), (True, "sample"), (False, "sample")]
)
def test_statistics_are_those_of_draws_from_the_posteriors(tmp_path, flip, stored):
    rng = np.random.default_rng(0)
    views, numbers = 1 + flip, shards.STORED[stored]
    values = rng.normal(3, 2, (700, views, numbers, *SHAPE))
    values[:, :, 1:] = np.abs(values[:, :, 1:])
    values[:, :, :, 1] *= 10
    values = values.astype(np.float16).astype(np.float64)
    found = reports.channel_statistics(write(tmp_path, values, flip, stored))
    for c in range(2):
        mean = values[:, :, 0, c]
        spread = values[:, :, 1, c] if stored == "moments" else np.zeros_like(mean)
        assert found.mean[c] == pytest.approx(mean.mean(), rel=1e-12)
        assert found.std[c] == pytest.approx(math.sqrt(mean.var() + (spread**2).mean()), rel=1e-12)
        assert (found.lowest[c], found.highest[c]) == (mean.min(), mean.max())
    drawn = values[:, :, 0] + (values[:, :, 1] * rng.standard_normal(values[:, :, 0].shape) if numbers == 2 else 0)
    np.testing.assert_allclose(found.std, drawn.std(axis=(0, 1, 3, 4)), rtol=0.03)


def test_the_table_has_stored_and_scaled_values(tmp_path, capsys):
    values = np.zeros((4, 1, 1, *SHAPE))
    values[:, 0, 0, 0] = np.array([-3, 1, 1, 5])[:, None, None]
    values[:, 0, 0, 1] = 8
    write(tmp_path, values, False, "sample", scale=0.25)
    reports.print_statistics(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = [[float(x) for x in line.split()] for line in lines if line.split()[0] in "01"]
    assert rows[0] == pytest.approx([0, 1, math.sqrt(8), -3, 5, 0.25, 0.25 * math.sqrt(8)], abs=1e-4)
    assert rows[1] == [1, 8, 0, 8, 8, 2, 0]
    assert "4 images; stored: sample; scaled by 0.25" in lines[0]


@pytest.mark.parametrize("error", [1, 16])
def test_psnr(error):
    image = np.full((5, 5, 3), 100, np.uint8)
    assert reports.psnr(image, image + np.uint8(error)) == pytest.approx(20 * math.log10(255 / error))
    assert reports.psnr(image + np.uint8(error), image) == reports.psnr(image, image + np.uint8(error))
    assert reports.psnr(image, image) == math.inf


class Darker(PixelAutoencoder):
    """Loses ten levels, and halves what the scale factor must double again."""

    scale_factor = 2.0

    def __init__(self):
        object.__setattr__(self, "identity", {"name": "darker", "sha256": ""})

    def encode(self, images):
        return images / 2, torch.zeros_like(images)

    def decode(self, latents):
        return super().decode(latents - 10 / 127.5)


@pytest.mark.parametrize(("size", "enlarged"), [(16, 128), (200, 200)])
def test_preview_shows_each_image_beside_its_reconstruction(tmp_path, capsys, size, enlarged):
    rng = np.random.default_rng(0)
    images = [rng.integers(20, 236, (size, size, 3), np.uint8) for _ in range(9)]
    names = ["a.png", "odd\n\udce9.png", "long/" * 80 + "x.png", *"defghi"]
    ratios = reports.write_preview(images, names, Darker(), tmp_path / "preview.png")
    expected = 20 * math.log10(255 / 10)
    assert ratios == pytest.approx([expected] * 9)
    assert f"9 images beside their reconstructions, mean PSNR {expected:.2f} dB" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "preview.png"))
    assert sheet.shape[1] <= reports.WIDEST
    columns = sheet.shape[1] // (2 * enlarged)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = reports.GAP + reports.LINE + row * (enlarged + reports.LINE + reports.GAP)
        left = reports.GAP + column * (2 * enlarged + reports.GAP)
        step = enlarged // size
        shown = sheet[top : top + enlarged : step, left : left + 2 * enlarged : step]
        assert np.array_equal(shown[:, :size], image)
        assert np.array_equal(shown[:, size:], image - 10)
        below = sheet[top + enlarged : top + enlarged + reports.LINE, left : left + 2 * enlarged]
        assert below.min() < 100  # there is text, and it stays below its picture
        assert (
            sheet[
                top + enlarged : top + enlarged + reports.LINE, left + 2 * enlarged : left + 2 * enlarged + reports.GAP
            ]
            == 255
        ).all()


def test_preview_of_an_exact_autoencoder(tmp_path, capsys):
    images = [np.arange(192, dtype=np.uint8).reshape(8, 8, 3)]
    assert reports.write_preview(images, ["a"], PixelAutoencoder(), tmp_path / "p.png") == [math.inf]
    assert "mean PSNR exact" in capsys.readouterr().out
