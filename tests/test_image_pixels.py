"""Image files as squares of pixels: size as ADM does it, orientation and mode whatever they are."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from switchdit.data.image_pixels import UnreadableImage, load_image, read_images, square
from switchdit.data.image_source import list_images


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def reference(pixels, size):
    """Halving and cropping written out by index; the bicubic step is Pillow's, on which the definition rests."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[:2]
        image = Image.fromarray(pixels)
        # a box filter over the exact, for odd sizes fractional, source interval of each target pixel
        pixels = np.asarray(image.resize((width // 2, height // 2), Image.Resampling.BOX))
        if height % 2 == 0 and width % 2 == 0:
            blocks = np.asarray(image).reshape(height // 2, 2, width // 2, 2, 3).astype(float).mean((1, 3))
            assert np.abs(pixels - blocks).max() <= 1
    height, width = pixels.shape[:2]
    new = (size, round(width * size / height)) if height < width else (round(height * size / width), size)
    pixels = np.asarray(Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BICUBIC))
    return pixels[(new[0] - size) // 2 :, (new[1] - size) // 2 :][:size, :size]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (33, 32), (64, 129), (131, 65), (7, 9), (300, 40)])
def test_size_as_in_adm(height, width):
    pixels = noise(height, width)
    ours = square(Image.fromarray(pixels), 16)
    assert ours.shape == (16, 16, 3)
    assert np.array_equal(ours, reference(pixels, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    quarter = [[255, 0], [0, 0]]  # upright: white top left
    upright = np.kron(np.array(quarter, np.uint8), np.ones((16, 16), np.uint8))
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / f"x{suffix}", exif=exif)
    loaded = load_image(tmp_path / f"x{suffix}", 16)[:, :, 0]
    assert loaded[:7, :7].min() > 240
    assert max(loaded[9:].max(), loaded[:, 9:].max()) < 15


def test_modes_become_rgb(tmp_path):
    rgb = np.full((20, 20, 3), (200, 100, 50), np.uint8)
    image = Image.fromarray(rgb)
    rgba = image.copy()
    rgba.putalpha(7)
    palette = image.quantize(4)
    clear = image.quantize(4)
    clear.info["transparency"] = bytes([0, 255, 255, 255])
    files = {"cmyk.jpg": image.convert("CMYK"), "rgba.png": rgba, "palette.png": palette, "clear.png": clear}
    for name, picture in files.items():
        picture.save(tmp_path / name, **({"quality": 95} if name.endswith("jpg") else {}))
        assert np.abs(load_image(tmp_path / name, 16).astype(int) - rgb[:16, :16]).max() <= 4, name
    for name, picture, grey in [
        ("l.png", Image.fromarray(np.full((20, 20), 77, np.uint8)), 77),
        ("bit.png", Image.new("1", (20, 20), 1), 255),
        ("16.png", Image.fromarray(np.full((20, 20), 77 * 257 + 100, np.uint16)), 77),
        ("16.tif", Image.fromarray(np.full((20, 20), 65535, np.uint16)), 255),
        ("la.png", Image.merge("LA", [Image.new("L", (20, 20), 9), Image.new("L", (20, 20), 0)]), 9),
    ]:
        picture.save(tmp_path / name)
        assert np.array_equal(load_image(tmp_path / name, 16), np.full((16, 16, 3), grey)), name


@pytest.mark.parametrize(
    ("picture", "reason"),
    [(Image.new("F", (20, 20)), "floating-point"), (Image.new("RGB", (1, 60000)), "too long and thin")],
)
def test_pictures_that_have_no_sensible_meaning(tmp_path, picture, reason):
    picture.save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match=reason):
        load_image(tmp_path / "x.tif", 64)


def png_of(width, height, rows):
    """A PNG that says it has these many pixels of one bit, and whose data are ``rows``."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_decompression_bombs_are_no_images_and_very_large_ones_are(recwarn):
    assert load_image(io.BytesIO(png_of(16, 16, b"\0\xff\xff" * 16)), 16).min() == 255
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        load_image(io.BytesIO(png_of(200_000, 200_000, b"\0" * 1000)), 16)
    with pytest.raises(UnreadableImage):
        load_image(io.BytesIO(png_of(10_000, 10_000, b"\0" * 1000)), 16)
    assert not list(recwarn)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_damaged_files_are_unreadable_images_and_nothing_else(suffix):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 30)).save(file, suffix, exif=exif)
    chance, read = random.Random(suffix), 0
    for _ in range(150):
        data = bytearray(file.getvalue())
        for _ in range(chance.choice((1, 5))):
            data[chance.randrange(chance.choice((60, len(data))))] = chance.randrange(256)
        try:
            read += load_image(io.BytesIO(data[: chance.choice((None, chance.randrange(len(data))))]), 16).shape[0]
        except UnreadableImage as problem:
            if not str(problem) or "\n" in str(problem):
                pytest.fail(repr(problem))
    assert read % 16 == 0


def test_postscript_is_never_run_whatever_its_name(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UnreadableImage, match="none of BMP"):
        load_image(tmp_path / "x.png", 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_many_images_come_in_the_order_asked_for(tmp_path, workers):
    for index in range(5):
        Image.new("L", (20, 20), index).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "5.png")  # to which nobody writes
    order = [4, 0, 3, 5, 1, 1]
    read = list(read_images(list_images(tmp_path), order, 16, workers, ahead=2))
    assert "none of BMP" in str(read.pop(2))
    assert "a pipe or a device" in str(read.pop(2))
    assert [image.shape for image in read] == [(16, 16, 3)] * 4
    assert [int(image.max()) for image in read] == [4, 0, 1, 1]
