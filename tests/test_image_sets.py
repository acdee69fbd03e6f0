"""Sets of images: what is read is what was saved, in any part; what is damaged or lies ends in one line, quickly."""

import io
import json
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from switchdit.errors import UserError
from tools import array_files, image_sets
from tools.image_sets import open_images


def some_images(count=23, height=5, width=4):
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def head(shape, descr="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def read_all(path):
    """What the program would do: open the set, read all of it. Returns the images or the one line of the mistake."""
    try:
        return np.concatenate(list(open_images(path, "--ref").batches(7)))
    except UserError as mistake:
        return str(mistake) if len(str(mistake).splitlines()) == 1 else "it has more than one line"


class Unseekable(io.RawIOBase):
    """A pipe: zipfile then writes sizes and checksum behind the member instead of before it."""

    def __init__(self, file):
        self.file = file

    def writable(self):
        return True

    def write(self, data):
        return self.file.write(data)


def write_set(path, kind, images, labels):
    arrays = {"arr_0": images, "arr_1": labels}
    if kind == "folder":
        path.mkdir(exist_ok=True)
        for old in path.iterdir():
            old.unlink()
        for i, image in enumerate(images):
            Image.fromarray(image).save(path / f"{i:04d}.png")
    elif kind == "safetensors":
        safetensors.numpy.save_file(arrays, path)
    elif kind == "zip64":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    member.write(npy(array))
    elif kind == "streamed":
        with open(path, "wb") as file, zipfile.ZipFile(Unseekable(file), "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    member.write(npy(array))
    else:
        (np.savez if kind == "stored" else np.savez_compressed)(path, **arrays)


KINDS = ["stored", "compressed", "zip64", "streamed", "safetensors", "folder"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_part_of_a_set_is_what_was_saved(kind, tmp_path_factory, data):
    count, size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    suffix = {"folder": "", "safetensors": ".safetensors"}.get(kind, ".npz")
    path = tmp_path_factory.getbasetemp() / f"part_{kind}{suffix}"
    images, labels = some_images(count), np.arange(count)
    write_set(path, kind, images, labels)
    opened = open_images(path, "--ref")
    assert (opened.count, opened.shape) == (count, (5, 4))
    batches = list(opened.batches(size, start, stop))
    assert all(len(batch) == size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate([images[:0], *batches]), images[start:stop])
    np.testing.assert_array_equal(np.concatenate(list(opened.batches(size))), images)
    if kind != "folder":
        np.testing.assert_array_equal(opened.labels, labels)


def test_the_only_images_of_a_safetensors_file_may_have_any_name(tmp_path):
    path = tmp_path / "set.safetensors"
    sigma = np.eye(4, dtype=np.float32)
    safetensors.numpy.save_file({"samples": some_images(), "mu": np.ones(4, np.float32), "sigma": sigma}, path)
    opened = open_images(path, "--ref")
    assert opened.count == 23
    np.testing.assert_array_equal(opened.statistics["sigma"], sigma)
    safetensors.numpy.save_file({"a": some_images(), "b": some_images()}, path)
    assert read_all(path) == f"--ref {path} has no array arr_0 (images, uint8, NHWC); it holds a, b"


def test_checksum_is_that_of_the_content(tmp_path):
    write_set(tmp_path / "a.npz", "stored", some_images(), np.arange(23))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    a, b = (open_images(tmp_path / name, "--ref") for name in ("a.npz", "b.npz"))
    assert a.sha256() == b.sha256() == image_sets.sha256_of(tmp_path / "a.npz")
    (tmp_path / "a.npz").unlink()
    assert a.sha256() == b.sha256()  # computed once


# ------------------------------------------------------------------------------------------ damage and lies


@pytest.mark.parametrize("kind", ["stored", "compressed", "streamed", "safetensors"])
def test_a_file_cut_anywhere_is_one_line(kind, tmp_path):
    suffix = ".safetensors" if kind == "safetensors" else ".npz"
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write_set(whole, kind, some_images(6), np.arange(6))
    content = whole.read_bytes()
    for length in {*range(0, len(content), 11), len(content) - 1}:
        path.write_bytes(content[:length])
        line = read_all(path)
        assert isinstance(line, str) and str(path) in line, length


@pytest.mark.parametrize("kind", ["stored", "compressed", "safetensors"])
def test_a_file_with_other_bytes_is_one_line_or_other_images(kind, tmp_path):
    suffix = ".safetensors" if kind == "safetensors" else ".npz"
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"other{suffix}"
    write_set(whole, kind, some_images(6), np.arange(6))
    content, rng = whole.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        other = bytearray(content)
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            other[at] = rng.integers(256)
        path.write_bytes(other)
        read = read_all(path)
        assert isinstance(read, str) or read.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=200), prefix=st.sampled_from([b"", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{", b"\x93NUMPY"])
)
def test_any_bytes_are_one_line(content, prefix, tmp_path_factory):
    for suffix in (".npz", ".safetensors"):
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        path.write_bytes(prefix + content)
        assert "is not a sound" in read_all(path)


def test_bytes_that_the_checksum_does_not_know_are_found(tmp_path):
    path = tmp_path / "set.npz"
    images = some_images(300)  # more than the head that is read when the set is opened
    write_set(path, "stored", images, np.arange(300))
    content = bytearray(path.read_bytes())
    content[content.index(images.tobytes()[:40]) + 10] ^= 1
    path.write_bytes(content)
    assert "arr_0 is damaged (Bad CRC-32" in read_all(path)
    assert len(list(open_images(path, "--ref").batches(7, 0, 14))) == 2  # only who reads to the end can know


def bomb(path, shape, payload, **member):
    """A .npz whose arr_0 claims ``shape`` and packs ``payload`` zeros behind its head."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            file.write(head(shape))
            for _ in range(payload >> 20):
                file.write(bytes(1 << 20))
        for name, value in member.items():
            setattr(archive.getinfo("arr_0.npy"), name, value)


def test_claims_of_what_a_file_does_not_hold_end_quickly_and_in_little_memory(tmp_path):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    path = tmp_path / "bomb.npz"
    claimed = (10**8, 8, 8, 3)
    for packed in ({}, {"compress_size": 10**10}):
        bomb(path, claimed, 1 << 20, file_size=len(head(claimed)) + 192 * 10**8, **packed)
        assert "arr_0 is damaged: its" in read_all(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", head((10**8, 0, 1, 3)))
    assert "which no set of images has" in read_all(path)
    claimed = (10**7, 8, 8, 3)
    bomb(path, claimed, 1 << 20)
    assert "do not make its" in read_all(path)
    claimed = (10**5, 64, 64, 3)  # below the size that is looked at twice, and not there
    bomb(path, claimed, 1 << 20, file_size=len(head(claimed)) + 12288 * 10**5, compress_size=1 << 24)
    assert "arr_0 is damaged" in read_all(path)
    labels = {"arr_0.npy": npy(some_images(5)), "arr_1.npy": head((10**9,), "<i8")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in labels.items():
            archive.writestr(name, content)
    assert "arr_1 is damaged" in read_all(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert time.monotonic() - started < 5


def test_what_really_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "SUSPICIOUS_BYTES", 1 << 20)
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, np.zeros((200, 64, 64, 3), np.uint8))
    assert "would unpack to 2457600" in read_all(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_numpy_does_not_write_is_refused(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", npy(some_images()))
    assert "compressed in a way that numpy does not write" in read_all(tmp_path / "set.npz")


@pytest.mark.parametrize("name", ["arr_0", "arr_1", "mu", "sigma_s"])
def test_no_pickle_is_run(name, tmp_path):
    marker = tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return (Path.touch, (marker,))

    objects = np.empty(23, object)
    objects[0] = Touch()
    disguised = head((23,), "<i8") + pickle.dumps(Touch())
    for content in (npy(objects, allow_pickle=True), pickle.dumps(Touch()), disguised):
        with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
            if name != "arr_0":
                archive.writestr("arr_0.npy", npy(some_images()))
            archive.writestr(f"{name}.npy", content)
        assert isinstance(read_all(tmp_path / "bad.npz"), str)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ({"dtype": "U8", "shape": [2, 2, 2, 3], "data_offsets": [0, 24]}, None),
        ({"dtype": "U8", "shape": [9**9, 8, 8, 3], "data_offsets": [0, 24]}, "is not a sound .safetensors file"),
        ({"dtype": "U8", "shape": [2, 2, 2, 3], "data_offsets": [0, 10**12]}, "is not a sound .safetensors file"),
        ({"dtype": "U8", "shape": [2**62, 2**62, 4, 3], "data_offsets": [0, 24]}, "is not a sound .safetensors file"),
        ({"dtype": "U8", "shape": [-2, 2, 2, 3], "data_offsets": [0, 24]}, "is not a sound .safetensors file"),
        ({"dtype": "U8", "shape": [2, 2, 2, 3], "data_offsets": [4, 28]}, "is not a sound .safetensors file"),
        ({"dtype": "BF16", "shape": [1, 2, 2, 3], "data_offsets": [0, 24]}, "arr_0 has dtype BF16, not uint8"),
        ({"dtype": "F8_E4M3", "shape": [2, 2, 2, 3], "data_offsets": [0, 24]}, "arr_0 has dtype F8_E4M3, not uint8"),
        ({"dtype": "U8", "shape": [2, 3, 2, 2], "data_offsets": [0, 24]}, "arr_0 has shape (2, 3, 2, 2)"),
    ],
)
def test_a_safetensors_header_that_lies_is_one_line(array, message, tmp_path):
    text = json.dumps({"arr_0": array}).encode()
    (tmp_path / "set.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    read = read_all(tmp_path / "set.safetensors")
    assert message in read if message else read.shape == (2, 2, 2, 3)


@pytest.mark.parametrize("length", [2**63, 10**9, 0, 7])
def test_a_safetensors_length_that_lies_is_one_line(length, tmp_path):
    (tmp_path / "set.safetensors").write_bytes(struct.pack("<Q", length) + b'{"arr_0": 1}')
    assert "is not a sound .safetensors file" in read_all(tmp_path / "set.safetensors")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_damaged_picture_in_a_folder_is_one_line(suffix, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.{suffix}")
    content = (tmp_path / f"4.{suffix}").read_bytes()
    for length in range(0, len(content) - 12, 29):
        (tmp_path / f"4.{suffix}").write_bytes(content[:length])
        assert f"4.{suffix} cannot be read" in read_all(tmp_path)
    for _ in range(60):
        other = bytearray(content)
        other[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / f"4.{suffix}").write_bytes(other)
        read = read_all(tmp_path)
        assert not isinstance(read, str) or f"4.{suffix}" in read


def test_other_formats_are_not_tried(tmp_path):
    for i in range(3):
        Image.fromarray(some_images(1)[0]).save(tmp_path / f"{i}.png")
    Image.fromarray(some_images(1)[0]).save(tmp_path / "2.png", format="EPS")
    assert "2.png cannot be read (cannot identify image file" in read_all(tmp_path)


def test_a_picture_that_claims_to_be_huge_is_not_decoded(tmp_path):
    for i in range(3):
        Image.fromarray(some_images(1)[0]).save(tmp_path / f"{i}.png")
    content = bytearray((tmp_path / "2.png").read_bytes())
    content[16:24] = struct.pack(">II", 10**5, 100)  # width, height; and the checksum of their chunk
    content[29:33] = struct.pack(">I", zipfile.crc32(bytes(content[12:29])))
    (tmp_path / "2.png").write_bytes(content)
    assert "100000 x 100 pixels are more than any image to score has" in read_all(tmp_path)
