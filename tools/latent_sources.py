"""Latents as other projects store them, one .npy file for each image: fast-DiT's folders, EDM2's folders and zip files.

Nothing is unpacked and no pickle is read: a file counts when its head says what is expected, byte by byte, and a name
in dataset.json when it is that of a file found in the folder or archive.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from switchdit.data.npy_header import parse_npy_header
from switchdit.errors import UserError
from switchdit.progress import progress
from tools.array_files import DAMAGED

# N = images, (C, h, w) = latent shape

DATASET_JSON = "dataset.json"
NUMBERED = re.compile(r"\d{1,12}\.npy")
LARGEST_FILE, LARGEST_JSON, LARGEST_LABEL = 1 << 26, 1 << 29, 1 << 24  # bytes, bytes, classes
LONGEST_NAME = 250
THREADS, CHUNK = 8, 64  # files are read in threads, CHUNK by each: that hides the latency of disks


@dataclass(frozen=True)
class Source:
    """Latents to import.

    where: the folder or file, for messages. names, sizes (bytes), stamps and labels (int64) of the N files, in order.
    A stamp changes when the file is replaced: its time of modification in whole seconds or, in a zip, its CRC32.
    stored: "moments" for files (2C, h, w), "sample" for files (1, C, h, w). scaled: by the autoencoder's factor. read:
    the float32 values of the i-th file, of the shape of the first; `UserError` where it holds anything else.
    """

    format: str
    where: Path
    names: list[str]
    sizes: list[int]
    stamps: list[int]
    labels: np.ndarray
    latent_shape: tuple[int, int, int]
    stored: str
    scaled: bool
    read: Callable[[int], np.ndarray]


def open_source(path: Path, format: str = "auto") -> Source:
    """Look at ``path``, list its files and read their labels. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"--from {path} does not exist")
    if format == "auto":
        format = "edm2" if path.is_file() or (path / DATASET_JSON).is_file() else "fast-dit"
    if path.is_file() and format != "edm2":
        raise UserError(f"--from {path} is a file; --format {format} is a folder of folders")
    return FORMATS[format](path)


def in_chunks(read: Callable[[int], Any], files: range) -> Iterator[tuple[range, list[Any]]]:
    """``read(i)`` of all files in order, some files at a time, in threads; all results may be in memory at once."""
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from zip(chunks, pool.map(lambda chunk: [read(i) for i in chunk], chunks), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# -------------------------------------------------------------------------------------------------- fast-DiT


def open_fast_dit(path: Path) -> Source:
    features = sorted(folder for folder in path.glob("*_features") if folder.is_dir())
    if len(features) != 1:
        found = f"{len(features)} folders" if features else "no folder"
        raise UserError(
            f"--from {path} holds neither {DATASET_JSON} (EDM2, REPA) nor, as fast-DiT, one folder NAME_features of "
            f"latents beside NAME_labels: {found} *_features"
        )
    labels = features[0].with_name(features[0].name.removesuffix("_features") + "_labels")
    if not labels.is_dir():
        raise UserError(f"--from {path} holds {features[0].name}, but no folder {labels.name} beside it")
    found, label_files = list_files(features[0]), list_files(labels)
    for folder, names in ((features[0], found), (labels, label_files)):
        if odd := next((name for name in names if not NUMBERED.fullmatch(name)), None):
            raise UserError(f"{folder} holds {shown(odd)}; expected are files named 0.npy, 1.npy, ...")
    check_same_names(features[0], found, labels, label_files)
    names = sorted(found, key=lambda name: (int(name.removesuffix(".npy")), name))

    def is_label(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
        return dtype in (np.int64, np.int32) and shape == (1,)

    def read_label(i: int) -> int:
        where = labels / names[i]
        return int(parse(read_file(where), where, "int64 (1,)", is_label)[0])

    with progress(desc="reading labels", total=len(names), unit="file") as bar:
        classes = np.empty(len(names), np.int64)
        for chunk, values in in_chunks(read_label, range(len(names))):
            classes[chunk.start : chunk.stop] = values
            bar.update(len(chunk))
    for name, label in zip(names, classes.tolist(), strict=True):
        check_label(label, labels / name)
    return make_source(
        "fast-dit",
        path,
        [f"{features[0].name}/{name}" for name in names],
        [found[name] for name in names],
        classes,
        lambda name: read_file(path / name),
    )


# ------------------------------------------------------------------------------------------------ EDM2, REPA


def open_edm2(path: Path) -> Source:
    found, read = list_archive(path) if path.is_file() else (list_files(path), lambda name: read_file(path / name))
    if path.is_dir() and not (path / DATASET_JSON).is_file():
        raise UserError(f"--from {path} holds no {DATASET_JSON}")
    labels = parse_dataset_json(read(DATASET_JSON), path / DATASET_JSON)
    if labels is None:
        labels = dict.fromkeys(found, 0)
    check_same_names(path, found, path / DATASET_JSON, labels)
    names = sorted(found)
    classes = np.array([labels[name] for name in names], np.int64)
    return make_source("edm2", path, names, [found[name] for name in names], classes, read)


def parse_dataset_json(content: bytes, where: Path) -> dict[str, int] | None:
    """Label of each file, or None when there are no classes. Raises `UserError`."""
    try:
        labels = json.loads(content)["labels"]
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise UserError(f'{where} is damaged: not a JSON object {{"labels": ...}}') from problem
    if labels is None:
        return None
    if not isinstance(labels, list):
        raise UserError(f'{where}: "labels" is neither a list of [NAME, CLASS] nor null')
    found: dict[str, int] = {}
    for entry in labels:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f'{where}: an entry of "labels" is not [NAME, CLASS] but {shown(entry)}')
        name, label = entry
        if name in found:
            raise UserError(f"{where} names {shown(name)} more than once")
        check_label(label, f"{where} at {shown(name)}")
        found[name] = label
    return found


def list_archive(path: Path) -> tuple[dict[str, tuple[int, int]], Callable[[str], bytes]]:
    """Sizes and CRC32s of the .npy files in a zip file by name, and what reads one of its files."""
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED as problem:
        raise UserError(f"--from {path} is not a sound zip file ({reason(problem)})") from problem
    members = {info.filename: info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise UserError(f"--from {path} holds files of the same name")
    if DATASET_JSON not in members:
        raise UserError(f"--from {path} holds no {DATASET_JSON}")

    def read(name: str) -> bytes:
        limit = LARGEST_JSON if name == DATASET_JSON else LARGEST_FILE
        try:
            with archive.open(members[name]) as file:  # safe from several threads
                content = file.read(limit + 1)
        except DAMAGED as problem:
            raise UserError(f"{path}: {shown(name)} is damaged ({reason(problem)})") from problem
        if len(content) > limit:
            raise UserError(f"{path}: {shown(name)} is larger than {limit} bytes")
        return content

    return {name: (info.file_size, info.CRC) for name, info in members.items() if name.endswith(".npy")}, read


# ---------------------------------------------------------------------------------------------- files, checks


def list_files(root: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times (s) of all .npy files below a folder by their names in it; links to folders are not followed."""
    found: dict[str, tuple[int, int]] = {}
    for parent, _, files in os.walk(root):
        for file in files:
            if file.endswith(".npy") and not file.startswith("."):
                path = Path(parent, file)
                about = path.stat() if path.exists() else None
                if about is None or not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
                    raise UserError(f"{path} is no file")
                found[os.path.relpath(path, root).replace(os.sep, "/")] = about.st_size, int(about.st_mtime)
    return found


def read_file(path: Path) -> bytes:
    limit = LARGEST_JSON if path.name == DATASET_JSON else LARGEST_FILE
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
    if len(content) > limit:
        raise UserError(f"{path} is larger than {limit} bytes")
    return content


def check_same_names(here: Path, names: Sequence[str] | dict, there: Path, others: Sequence[str] | dict) -> None:
    """Raise `UserError` unless there is at least one file, and both know the same ones, by names that can be told."""
    if not names:
        raise UserError(f"{here} holds no .npy files")
    if odd := next((name for name in names if not name.isprintable() or len(name) > LONGEST_NAME), None):
        raise UserError(f"{here} holds a file of the name {shown(odd)}; rename it")
    for one, other, first, second in ((names, others, here, there), (others, names, there, here)):
        if missing := next((name for name in one if name not in other), None):
            raise UserError(f"{first} has {shown(missing)}, {second} does not")


def shown(value: Any) -> str:
    """What a stranger wrote, as part of a line."""
    return repr(value)[:80]


def reason(problem: Exception) -> str:
    return str(problem)[:80] or type(problem).__name__


def check_label(label: Any, where: Any) -> None:
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < LARGEST_LABEL:
        raise UserError(f"{where}: the label {shown(label)} is not a class number from 0 up")


def parse(content: bytes, where: Any, expected: str, fits: Callable[[np.dtype, tuple[int, ...]], bool]) -> np.ndarray:
    """The array of a .npy file whose type and shape fit; `UserError` for anything else, saying what is ``expected``."""
    try:
        header = parse_npy_header(content)
    except ValueError as problem:
        raise UserError(f"{where} cannot be read: {problem}") from problem
    if not fits(header.dtype, header.shape):
        raise UserError(f"{where} holds {header.dtype} {header.shape}; expected is {expected}")
    if header.file_size != len(content):
        raise UserError(f"{where} is damaged: it has {len(content)} bytes, {header.file_size} by its head")
    return np.frombuffer(content, header.dtype, offset=header.offset).reshape(header.shape)


@dataclass(frozen=True)
class Layout:
    """How a format stores the latents of an image; the two functions are each other's inverse."""

    stored: str
    scaled: bool
    expected: str
    in_file: Callable[[int, int, int], tuple[int, ...]]  # (C, h, w) -> shape in a file
    of_latent: Callable[[tuple[int, ...]], tuple[int, ...]]  # shape in a file -> (C, h, w)


LAYOUTS = {
    "fast-dit": Layout("sample", True, "float32 (1, C, h, w)", lambda c, h, w: (1, c, h, w), lambda shape: shape[1:]),
    "edm2": Layout(
        "moments",
        False,
        "float32 (2C, h, w)",
        lambda c, h, w: (2 * c, h, w),
        lambda shape: (shape[0] // 2, *shape[1:]),
    ),
}


def make_source(
    format: str,
    where: Path,
    names: list[str],
    found: list[tuple[int, int]],
    labels: np.ndarray,
    read: Callable[[str], bytes],
) -> Source:
    """A source whose files are all as the first. found: size and stamp of each."""
    layout = LAYOUTS[format]
    sizes, stamps = map(list, zip(*found, strict=True))

    def plausible(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
        rank = len(layout.in_file(1, 1, 1))
        return dtype == np.float32 and len(shape) == rank and layout.in_file(*layout.of_latent(shape)) == shape

    first = parse(read(names[0]), where / names[0], layout.expected, plausible)
    if not first.size:
        raise UserError(f"{where / names[0]} holds float32 {first.shape}, which is nothing")
    as_first = f"float32 {first.shape}, as in {names[0]}"

    def values(i: int) -> np.ndarray:
        return parse(read(names[i]), where / names[i], as_first, lambda *found: found == (first.dtype, first.shape))

    shape = layout.of_latent(first.shape)
    return Source(format, where, names, sizes, stamps, labels, shape, layout.stored, layout.scaled, values)


FORMATS = {"fast-dit": open_fast_dit, "edm2": open_edm2}
