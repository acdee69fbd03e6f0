"""Folder, tar and zip give the same images in the same order; what is hostile or damaged is named, never unpacked."""

import errno
import io
import json
import os
import random
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchdit.data.image_pixels import UnreadableImage, read_images
from switchdit.data.image_source import LARGEST_FILE, list_images
from switchdit.errors import UserError

FILES = {"b/2.png": b"b2", "a b/x/9.jpg": b"ab", "a/10.JPEG": b"a10", "a/9.png": b"", "b/é.webp": b"c" * 700}
LONG = "a/" + "d" * 90 + "/" + "e" * 120 + ".png"  # beyond the fields of a tar header


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path, files, kind=tarfile.GNU_FORMAT, prefix="", **fields):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path, files, prefix="", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(prefix + name, data)
    return path


def shuffled(files):
    names = list(files)
    random.Random(0).shuffle(names)
    return {name: files[name] for name in names}


def all_kinds(tmp_path, files):
    mixed = shuffled({**files, "a/notes.txt": b"no image", "a/.hidden.png": b"", ".git/x.png": b""})
    outer = {}
    for name, data in files.items():
        top, _, rest = name.partition("/")
        outer.setdefault(f"{top}.tar", {})[rest] = data
    nested = {name: write_tar(tmp_path / "inner.tar", inner).read_bytes() for name, inner in outer.items()}
    return {
        "folder": write_folder(tmp_path / "folder", mixed),
        "folder in a folder": write_folder(tmp_path / "outer" / "inner", mixed).parent,
        "gnu": write_tar(tmp_path / "gnu.tar", mixed, prefix="./"),
        "pax": write_tar(tmp_path / "pax.tar", mixed, tarfile.PAX_FORMAT, prefix="imagenet/"),
        "tar of tars": write_tar(tmp_path / "nested.tar", nested),
        "deflated": write_zip(tmp_path / "d.zip", {**mixed, "__MACOSX/a/._9.png": b"mac"}),
        "stored": write_zip(tmp_path / "s.zip", mixed, "imagenet/", zipfile.ZIP_STORED),
    }


def test_all_kinds_list_and_read_the_same(tmp_path):
    files = {**FILES, LONG: b"long"}
    names = ["a/10.JPEG", "a/9.png", LONG, "a b/x/9.jpg", "b/2.png", "b/é.webp"]
    for kind, path in all_kinds(tmp_path, files).items():
        source = list_images(path)
        assert source.names == names, kind
        assert source.class_names == ["a", "a b", "b"], kind
        assert source.labels == [0, 0, 0, 1, 2, 2], kind
        assert [source.reader(i)() for i in range(6)] == [files[name] for name in names], kind
        assert source.sizes == [len(files[name]) for name in names], kind
        assert source.identities() == names
        assert names[3] in source.where(3)


@given(st.sets(st.from_regex(r"[a-c](/[a-z ]{1,3}){1,3}\.png", fullmatch=True), min_size=2, max_size=8))
def test_order_is_that_of_classes_then_paths(tmp_path_factory, names):
    tmp_path = tmp_path_factory.mktemp("order")
    files = {name: name.encode() for name in names}
    if any(one != other and other.startswith(one + "/") for one in names for other in names):
        return  # no folder has the name of a file
    listed = [
        list_images(path) for path in (write_tar(tmp_path / "x.tar", files), write_zip(tmp_path / "x.zip", files))
    ]
    listed.append(list_images(write_folder(tmp_path / "x", files)))
    for source in listed:
        assert source.names == sorted(source.names, key=lambda name: (name.split("/")[0], name))
        assert source.names == listed[0].names
        assert all(source.reader(i)().decode().endswith(name) for i, name in enumerate(source.names))


# -------------------------------------------------------------------------------------------------- labels

LABELLED = {"x/1.png": b"1", "x/2.png": b"2", "y.png": b"3"}
LABEL_FILES = {
    "names.csv": ("x/1.png,dog\nx/2.png,cat\ny.png,dog\n", ["cat", "dog"], [0, 1, 1]),
    "headed.csv": ('\ufefffile,label\nx/1.png,dog\n\n"x/2.png",cat\ny.png,dog', ["cat", "dog"], [0, 1, 1]),
    "numbers.csv": ("x/1.png,3\nx/2.png,0\ny.png, 3\n", ["0", "1", "2", "3"], [0, 3, 3]),
    "object.json": ('{"x/1.png": 3, "x/2.png": 0, "y.png": 3}', ["0", "1", "2", "3"], [0, 3, 3]),
    "pairs.json": ('{"labels": [["x/1.png", 1], ["x/2.png", 0], ["y.png", 1]]}', ["0", "1"], [0, 1, 1]),
    "names.json": ('{"x/1.png": "dog", "x/2.png": "cat", "y.png": "dog"}', ["cat", "dog"], [0, 1, 1]),
    "quoted.json": ('{"x/1.png": "2", "x/2.png": "0", "y.png": 2}', ["0", "1", "2"], [0, 2, 2]),
    "quoted pairs.json": (
        '{"labels": [["x/1.png", "2"], ["x/2.png", "0"], ["y.png", "2"]]}',
        ["0", "1", "2"],
        [0, 2, 2],
    ),
    "digits and names.json": ('{"x/1.png": "2", "x/2.png": "10", "y.png": "two"}', ["10", "2", "two"], [0, 1, 2]),
    "digits and names.csv": ("x/1.png,2\nx/2.png,10\ny.png,two\n", ["10", "2", "two"], [0, 1, 2]),
}


@pytest.mark.parametrize("name", LABEL_FILES)
def test_labels_from_a_file(tmp_path, name):
    text, class_names, labels = LABEL_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    data = write_zip(tmp_path / "x.zip", LABELLED)
    source = list_images(data, tmp_path / name)
    assert (source.class_names, source.labels) == (class_names, labels)
    assert source.names == ["x/2.png", "x/1.png", "y.png"]
    assert source.identities()[0] == f"{class_names[0]}/x/2.png"
    assert [source.reader(i)() for i in range(3)] == [b"2", b"1", b"3"]


def test_unlabeled_images_are_one_class_wherever_they_lie(tmp_path):
    source = list_images(write_tar(tmp_path / "x.tar", LABELLED), unlabeled=True)
    assert (source.class_names, source.labels, source.names) == (["unconditional"], [0, 0, 0], sorted(LABELLED))
    assert source.identities() == [f"unconditional/{name}" for name in source.names]


BROKEN_LABELS = {
    "empty": (b"", "holds no labels"),
    "headings alone": (b"file,label\n", "holds no labels"),
    "one field": (b"x/1.png\n", "line 1: 1 fields"),
    "three fields": (b"x/1.png,1\nx/2.png,1,2\n", "line 2: 3 fields"),
    "no label": (b"x/1.png,\n", "nor the name of a class"),
    "large": (b"x/1.png,1000000\n", "label '1000000' of 'x/1.png' is not a whole number below"),
    "open quote": (b'x/1.png,"dog\n', "not CSV"),
    "binary": (b"\xff\xfe\0", "not text in UTF-8"),
    "lacks one": (b"x/1.png,1\nx/2.png,1\n", "lacks 1 images of "),
    "unknown": (b"x/1.png,1\nx/2.png,1\ny.png,1\nz\n.png,1", "line 4: 1 fields"),
    "unknown file": (b"x/1.png,1\nx/2.png,1\ny.png,1\nz.png,1", "names 1 files not in"),
    "twice": (b"x/1.png,1\nx/1.png,1\n", "names 'x/1.png' twice"),
    "cut json": (b'{"x/1.png": 1', "is not JSON"),
    "deep json": (b"[" * 100000, "is not JSON"),
    "null": (b'{"labels": null}', "pass --unlabeled"),
    "twice in json": (b'{"x/1.png": 1, "x/1.png": 2}', "names 'x/1.png' twice"),
    "float": (b'{"x/1.png": 1.5}', "not a whole number"),
    "bool": (b'{"x/1.png": true}', "not a whole number"),
    "negative": (b'{"x/1.png": -1}', "not a whole number"),
    "mixed": (b'{"x/1.png": 1, "x/2.png": "dog"}', "mixes numbers and names"),
    "large quoted": (b'{"x/1.png": "1000000"}', "label '1000000' of 'x/1.png' is not a whole number below"),
    "quoted and bool": (b'{"x/1.png": "1", "x/2.png": true}', "label 'True' of 'x/2.png' is not a whole number"),
    "no pairs": (b'{"labels": [["x/1.png"]]}', "no pair of a file and a label"),
    "number": (b"[1]", "no pair of a file and a label"),
}


@pytest.mark.parametrize("fault", BROKEN_LABELS)
def test_broken_labels_are_told_in_a_line(tmp_path, fault):
    text, message = BROKEN_LABELS[fault]
    (tmp_path / "labels").write_bytes(text)
    with pytest.raises(UserError) as problem:
        list_images(write_folder(tmp_path / "x", LABELLED), tmp_path / "labels")
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


def told(data, labels=None):
    """List and read; what goes wrong must be told in one line. The names that were listed."""
    try:
        source = list_images(data, labels)
    except UserError as problem:
        message = str(problem)
        return message if "\n" not in message else pytest.fail(message)
    for image in read_images(source, range(len(source.names)), 8, workers=0, ahead=0):
        assert isinstance(image, (np.ndarray, UnreadableImage))
        assert "\n" not in str(image) or isinstance(image, np.ndarray)
    return source.names


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:x/1.png\nabels20', max_size=60).map(str.encode))
def test_any_bytes_as_labels(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("labels") / "labels"
    path.write_bytes(text)
    told(write_folder(path.parent / "x", {"1.png": b""}), path)


# ----------------------------------------------------------------------------------------- hostile and damaged


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/1.png", "absolute path"),
        ("a/../../1.png", "leads out"),
        ("..", "leads out"),
        ("a//1.png", "no proper path"),
        ("a/./1.png", "no proper path"),
        ("./a/1.png", None),
    ],
)
def test_hostile_names(tmp_path, name, message):
    for path in (write_tar(tmp_path / "x.tar", {name: b""}), write_zip(tmp_path / "x.zip", {name: b""})):
        result = told(path)
        assert (message in result and repr(name) in result) if message else result == ["a/1.png"]


KINDS = [
    (tarfile.SYMTYPE, "link"),
    (tarfile.LNKTYPE, "link"),
    (tarfile.CHRTYPE, "device"),
    (tarfile.BLKTYPE, "device"),
    (tarfile.FIFOTYPE, "pipe"),
    (tarfile.GNUTYPE_SPARSE, "sparse"),
    (b"Z", "unknown kind"),
]


@pytest.mark.parametrize(("kind", "message"), KINDS)
def test_links_and_devices_in_a_tar(tmp_path, kind, message):
    result = told(write_tar(tmp_path / "x.tar", {"a/1.png": b""}, type=kind, linkname="/etc/passwd"))
    assert "'a/1.png' is" in result and message in result


def zip_with(path, name="a/1.png", data=b"1", **fields):
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo(name)
        for key, value in fields.items():
            setattr(member, key, value)
        archive.writestr(member, data)
    return path


def test_links_encryption_and_other_packing_in_a_zip(tmp_path):
    link = zip_with(tmp_path / "link.zip", data=b"/etc/passwd", external_attr=0o120777 << 16)
    assert "'a/1.png' is a link" in told(link)
    assert "'a/1.png' is a device" in told(zip_with(tmp_path / "device.zip", external_attr=0o020777 << 16))
    assert "packed by method 14" in told(zip_with(tmp_path / "lzma.zip", compress_type=zipfile.ZIP_LZMA))
    data = bytearray(zip_with(tmp_path / "locked.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    assert "is encrypted" in told(tmp_path / "locked.zip")


def test_same_name_twice(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("in/a/1.png"))
        tar.addfile(tarfile.TarInfo("in/b/1.png"))
    assert "two members named 'in/a/1.png'" in told(tmp_path / "x.tar")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.png", b"")
    assert "two members named 'a/1.png'" in told(tmp_path / "x.zip")


@pytest.mark.parametrize(("kind", "command"), [("gz", "gzip -dk"), ("xz", "xz -dk"), ("bz2", "bzip2 -dk")])
def test_compressed_tar_is_refused_with_the_command_that_helps(tmp_path, kind, command):
    with tarfile.open(tmp_path / "x.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a/1.png"))
    assert f"'{command} {tmp_path}/x.tar'" in told(tmp_path / "x.tar")


def test_other_things_than_images(tmp_path):
    (tmp_path / "text").write_text("text")
    assert "neither a .tar nor a .zip" in told(tmp_path / "text")
    assert "holds no images" in told(write_tar(tmp_path / "no.tar", {"a.txt": b""}))
    assert "a device or a pipe" in told(tmp_path.__class__("/dev/null"))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(write_folder(tmp_path / "x", {"a/1.png": b"", "b/2.png": b""}), "")
        empty = tarfile.TarInfo("c/")
        empty.type = tarfile.DIRTYPE
        tar.addfile(empty)
    assert "class folder c holds no images" in told(tmp_path / "x.tar")


def test_folder_linked_into_itself(tmp_path):
    write_folder(tmp_path, {"a/1.png": b""})
    os.symlink(tmp_path / "a", tmp_path / "a" / "again")
    assert "a/again is a link to a folder that it lies in" in told(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "pax", "zip"])
def test_truncated_archives_are_noticed_wherever_they_end(tmp_path, kind):
    files = {**FILES, LONG: b"long"}
    if kind == "zip":
        whole = write_zip(tmp_path / "whole", files).read_bytes()
    else:
        format = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
        whole = write_tar(tmp_path / "whole", files, format).read_bytes()
        whole = whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 1024 + 512]
        assert whole.endswith(b"\0" * 1024) and not whole.endswith(b"\0" * 1536)
    cut = tmp_path / "cut"
    for end in [*range(3, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:end])
        assert isinstance(told(cut), str), f"cut at {end} of {len(whole)}"


@pytest.mark.parametrize("kind", ["gnu", "pax", "deflated", "stored", "tar of tars"])
def test_flipped_bytes_are_told_in_a_line(tmp_path, kind):
    whole = all_kinds(tmp_path, {**FILES, LONG: b"long"})[kind].read_bytes()
    damaged, random_ = tmp_path / "damaged", random.Random(kind)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random_.choice((1, 1, 3))):
            data[random_.randrange(len(data) if "zip" in kind else min(len(data), 9000))] = random_.randrange(256)
        damaged.write_bytes(data)
        told(damaged)


def test_zip_members_that_lie_about_their_size(tmp_path):
    bomb = b"\0" * (1 << 20)
    for declared in (1, 1 << 19, 3 << 20, LARGEST_FILE):
        data = bytearray(write_zip(tmp_path / "bomb.zip", {"a/1.png": bomb}).read_bytes())
        entry = data.index(b"PK\1\2")
        data[entry + 24 : entry + 28] = declared.to_bytes(4, "little")
        (tmp_path / "bomb.zip").write_bytes(data)
        source = list_images(tmp_path / "bomb.zip")
        (image,) = read_images(source, [0], 8, workers=0, ahead=0)
        assert isinstance(image, UnreadableImage)
        assert "size" in str(image) or "too many" in str(image) or "no image" in str(image)


@pytest.mark.parametrize("blocks", [2, 3, 20, 126, 2048])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_may_be_filled_up_to_a_record(tmp_path, blocks, kind):
    record = blocks * 512
    for num in (3, 4, 5):
        files = {f"a/{i}.png": b"1" for i in range(num)}
        used = write_tar(tmp_path / "x.tar", files, kind).read_bytes()[: num * 1024]
        filled = used + b"\0" * (1024 + -(len(used) + 1024) % record)
        (tmp_path / "x.tar").write_bytes(filled)
        assert told(tmp_path / "x.tar") == list(files)
        outer = write_tar(tmp_path / "outer.tar", {"in.tar": filled, "other.tar": filled})
        assert len(told(outer)) == 2 * num


@pytest.mark.parametrize("nested", [False, True])
def test_zeros_inside_a_tar_and_what_follows_its_end_are_noticed(tmp_path, nested):
    files = {f"a/{i}.png": b"1" * 600 for i in range(4)}
    whole = write_tar(tmp_path / "x.tar", files).read_bytes()
    assert not any(whole[4 * 1536 :])
    base = 512 if nested else 0

    def told_of(data):
        return told(write_tar(tmp_path / "x.tar", {"in.tar": data, "z.tar": whole}) if nested else write(data))

    def write(data):
        (tmp_path / "x.tar").write_bytes(data)
        return tmp_path / "x.tar"

    holes = [(1536, 2048), (1536, 3584), (4608, 5120), (1536, 4 * 1536 - 512)]
    for start, end in holes:
        hole = whole[:start] + bytes(end - start) + whole[end:]
        assert f"damaged or half-downloaded: zeros at byte {base + start}," in told_of(hole)
    assert "half-downloaded: zeros at byte" in told_of(whole + bytes(1 << 20))
    assert "half-downloaded: zeros at byte" in told_of(whole + b"1")
    assert f"more follows after its end, at byte {base + len(whole)};" in told_of(whole + whole)
    assert f"more follows after its end, at byte {base + 3072};" in told_of(whole[:1536] + bytes(1536) + whole[3072:])


def test_a_sparse_tar_of_any_size_is_told_at_once(tmp_path):
    path = write_tar(tmp_path / "x.tar", FILES)
    os.truncate(path, 1 << 40)
    assert "damaged or half-downloaded" in told(path)


def test_sizes_and_places_beyond_all_bounds_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.png": b""})
    os.truncate(path, 512 + LARGEST_FILE + 512 + 1024)
    header = tarfile.TarInfo("a/1.png")
    header.size = LARGEST_FILE + 1
    with open(path, "r+b") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
    assert f"'a/1.png' is said to have {LARGEST_FILE + 1} bytes" in told(path)
    for at, size, value, message in [
        (24, 4, LARGEST_FILE + 1, f"'a/1.png' is said to have {LARGEST_FILE + 1} bytes"),
        (20, 4, 1 << 30, "'a/1.png' lies outside of the archive"),
        (42, 4, 1 << 30, "'a/1.png' lies outside of the archive"),
    ]:
        data = bytearray(write_zip(tmp_path / "x.zip", {"a/1.png": b"1"}).read_bytes())
        entry = data.index(b"PK\1\2")
        data[entry + at : entry + at + size] = value.to_bytes(size, "little")
        (tmp_path / "x.zip").write_bytes(data)
        assert message in told(tmp_path / "x.zip")


@pytest.mark.parametrize("field", ["file_size", "compress_size", "header_offset"])
def test_a_zip64_that_says_the_largest_number(tmp_path, monkeypatch, field):
    """Written by the standard library, whose directory is made to lie."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", b"1")
        setattr(archive.infolist()[0], field, (1 << 64) - 1)
    result = told(tmp_path / "x.zip")
    assert "'a/1.png'" in result and ("is said to have 18446744073709551615" in result or "lies outside" in result)


def test_links_that_lead_nowhere_and_pipes_are_images_that_cannot_be_read(tmp_path):
    write_folder(tmp_path, {"a/1.png": b"", "b/1.png": b""})
    os.symlink("nowhere", tmp_path / "a" / "gone.png")
    os.symlink("loop.png", tmp_path / "a" / "loop.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    os.mkfifo(tmp_path / "b" / "pipe.txt")
    source = list_images(tmp_path)
    assert source.names == ["a/1.png", "a/gone.png", "a/loop.png", "b/1.png", "b/pipe.png"]
    images = list(read_images(source, range(5), 8, workers=0, ahead=0))
    assert [str(images[i]) for i in (1, 2)] == [os.strerror(errno.ENOENT), os.strerror(errno.ELOOP)]
    assert "a pipe or a device" in str(images[4])
    os.symlink("nowhere", tmp_path / "c")
    assert "'c' cannot be read: No such file or directory" in told(tmp_path)


@pytest.mark.parametrize("locked", ["x/b", "x.tar", "x.zip", "labels"])
def test_what_may_not_be_read_is_told_in_a_line(tmp_path, monkeypatch, locked):
    data = write_folder(tmp_path / "x", FILES)
    write_tar(tmp_path / "x.tar", FILES)
    write_zip(tmp_path / "x.zip", FILES)
    (tmp_path / "labels").write_text("1.png,1\n")
    path = tmp_path / locked

    def refuse(real):
        def opened(file, *args, **kwargs):
            if os.fspath(file).rstrip("/") == str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return real(file, *args, **kwargs)

        return opened

    # root may read everything, so that modes would not show it
    monkeypatch.setattr(os, "scandir", refuse(os.scandir))
    monkeypatch.setattr("builtins.open", refuse(open))
    monkeypatch.setattr("io.open", refuse(io.open))
    message = told(path if path.suffix else data, path if locked == "labels" else None)
    assert f"{path}" in message and "cannot be read: Permission denied" in message


def test_stamps_change_with_the_images(tmp_path):
    folder = write_folder(tmp_path / "x", {"b/1.png": b"1", "a/1.png": b"2"})
    os.utime(folder / "a/1.png", (0, 1_000_000_000.25))
    os.utime(folder / "b/1.png", (0, 7))
    assert list_images(folder).stamps == [1_000_000_000, 7]
    tar = tmp_path / "x.tar"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tar, "w", format=kind) as archive:
            archive.add(folder / "b", "b")
            archive.add(folder / "a", "a")
        assert list_images(tar).stamps == [1_000_000_000, 7]
    before_1970 = list_images(write_tar(tar, {"a/1.png": b""}, mtime=-5)).stamps
    assert before_1970 != list_images(write_tar(tar, {"a/1.png": b""}, mtime=-6)).stamps
    zipped = write_zip(tmp_path / "x.zip", {"b/1.png": b"1", "a/1.png": b"2"})
    assert list_images(zipped).stamps == [zlib.crc32(b"2"), zlib.crc32(b"1")]


def test_nothing_is_unpacked(tmp_path, monkeypatch):
    inside, outside = tmp_path / "inside", tmp_path / "x.tar"
    inside.mkdir()
    monkeypatch.chdir(inside)
    write_tar(outside, FILES)
    told(outside)
    assert not list(inside.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "x.tar"]


def test_json_names_are_ascii_safe(tmp_path):
    name = os.fsdecode(b"a/\xff.png")
    for path in (write_folder(tmp_path / "x", {name: b""}), write_tar(tmp_path / "x.tar", {name: b""})):
        source = list_images(path)
        assert source.names == [name]
        assert json.loads(json.dumps(source.names)) == [name]
        assert source.where(0).encode()  # fit to be printed
