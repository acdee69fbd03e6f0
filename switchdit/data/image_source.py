"""Where images come from: a folder, a tar or a zip. Which files, of which class, in which order; and their bytes.

The same images give the same names, classes and order from each of the three, whatever the order in the archive, the
file system or the language of the machine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from switchdit.data.archives import LARGEST_FILE, Member, kind_of, read_tar, read_zip, tar_members, zip_members
from switchdit.data.image_labels import read_labels
from switchdit.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UNCONDITIONAL = "unconditional"  # the one class of images that have none
HIDDEN = "__MACOSX"  # what macOS adds to a zip


@dataclass
class ImageSource:
    """Images in their fixed order: by class, then by path.

    root: the archive, or the folder that names are relative to. names: paths with slashes. labels: class ids.
    sizes: of the files in bytes. stamps: a number for each that changes when it is replaced: its time of modification
    in whole seconds or, in a zip, its CRC32. places: where members of an archive lie, int64 (N, k). within: folders of
    an archive around the names. by_folder: names begin with the class.
    """

    kind: str
    root: Path
    class_names: list[str]
    names: list[str]
    labels: list[int]
    sizes: list[int]
    stamps: list[int]
    places: np.ndarray | None = None
    within: str = ""
    by_folder: bool = False

    def identities(self) -> list[str]:
        """A string for each image that tells its name and its class."""
        if self.by_folder:
            return self.names
        return [f"{self.class_names[label]}/{name}" for name, label in zip(self.names, self.labels, strict=True)]

    def reader(self, index: int) -> Callable[[], bytes]:
        """A function that returns the file's bytes; small enough to be sent to another process."""
        if self.kind == "folder":
            return partial(read_file, os.path.join(self.root, self.names[index]))
        return partial(READERS[self.kind], str(self.root), self.places[index].tolist())

    def where(self, index: int) -> str:
        """How to name an image to its owner: its path, or the archive's and its name there."""
        name = self.names[index]
        shown = name if name.isprintable() else repr(name)
        return f"{self.root / shown}" if self.kind == "folder" else f"{self.within}{shown} in {self.root}"


def read_file(path: str) -> bytes:
    """The content of a file; ValueError for a pipe, which would be waited for, or a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is a pipe or a device, not a file")
    with open(path, "rb") as file:
        return file.read()


def list_images(data: Path, labels: Path | None = None, unlabeled: bool = False) -> ImageSource:
    """List the images of a folder, a tar or a zip; `UserError` when there are none, their classes are unclear or they
    cannot be listed.

    Their classes are the folders that they lie in, unless ``labels`` names a file that says them (`read_labels`) or
    ``unlabeled`` puts all of them into one.
    """
    try:
        kind = kind_of(data)
        names, sizes, stamps, places, folders = _visible(data, LISTERS[kind](data))
    except OSError as problem:
        raise UserError(f"--data {problem.filename or data} cannot be read: {problem.strerror}") from problem
    source = ImageSource(kind, data, [UNCONDITIONAL], names, [0] * len(names), sizes, stamps)
    if labels is None and not unlabeled:
        _class_by_folder(source, folders)
    if not names:
        raise UserError(f"--data {data} holds no images ({' '.join(sorted(EXTENSIONS))})")
    if labels is not None:
        _class_by_file(source, labels)
    if kind != "folder":
        places = np.array(places, np.int64)
        if len(set(names)) < len(names):
            doubled = next(name for one, name in zip(sorted(names), sorted(names)[1:], strict=False) if one == name)
            raise UserError(f"--data {data} has two members named {source.within + doubled!r}")
    order = sorted(range(len(names)), key=lambda i: (source.labels[i], source.names[i]))
    source.names, source.labels, source.sizes, source.stamps = (
        [values[i] for i in order] for values in (source.names, source.labels, source.sizes, source.stamps)
    )
    source.places = None if kind == "folder" else places[order]
    return source


def _visible(
    data: Path, members: Iterator[Member]
) -> tuple[list[str], list[int], list[int], list[tuple[int, ...]], set[str]]:
    """Names, sizes, stamps and places of the images, and the folders, without hidden ones."""
    names, sizes, stamps, places, folders = [], [], [], [], set()
    extensions = tuple(EXTENSIONS)
    for name, size, stamp, place in members:
        if name.startswith((".", HIDDEN)) or "/." in name:
            continue
        if name.endswith("/"):
            folders.add(name)
        elif name.lower().endswith(extensions):
            if size > LARGEST_FILE:
                raise UserError(
                    f"--data {data}: {name!r} is said to have {size} bytes; images have {LARGEST_FILE} at most"
                )
            names.append(name)
            sizes.append(size)
            stamps.append(stamp)
            places.append(place)
    return names, sizes, stamps, places, folders


def _class_by_folder(source: ImageSource, folders: set[str]) -> None:
    """Give ``source`` the classes that its folders say. A lone folder around the folders of the classes is no class."""
    within = ""
    while True:
        tops = {name[: name.find("/") + 1] for name in source.names} | {name[: name.find("/") + 1] for name in folders}
        loose = [name for name in source.names if "/" not in name]
        tops.discard("")
        outer = next(iter(tops), "")
        if loose or len(tops) != 1 or not source.names or any("/" not in name[len(outer) :] for name in source.names):
            break
        within += outer
        source.names[:] = [name[len(outer) :] for name in source.names]
        folders = {name[len(outer) :] for name in folders}
    where = f"--data {source.root}" + (f" ({within})" if within else "")
    classes = sorted(top[:-1] for top in tops)
    if source.kind == "folder":
        source.root = source.root / within
    else:
        source.within = within
    if loose and classes:
        raise UserError(
            f"{where} holds class folders ({classes[0]}) and images outside of them ({min(loose)}); "
            "move either, or pass --labels or --unlabeled"
        )
    if not classes:
        return
    ids = {name: label for label, name in enumerate(classes)}
    source.labels[:] = [ids[name.partition("/")[0]] for name in source.names]
    source.class_names, source.by_folder = classes, True
    if len(set(source.labels)) < len(classes):
        empty = min(set(range(len(classes))) - set(source.labels))
        raise UserError(f"{where}: the class folder {classes[empty]} holds no images; remove or fill it")


def _class_by_file(source: ImageSource, path: Path) -> None:
    """Give ``source`` the classes of a file of labels, which must name these images and no others."""
    labels, source.class_names = read_labels(path, EXTENSIONS)
    there = set(source.names)
    missing = sorted(there - labels.keys())
    if missing:
        raise UserError(f"--labels {path} lacks {len(missing)} images of {source.root}, such as {missing[0]!r}")
    unknown = sorted(labels.keys() - there)
    if unknown:
        raise UserError(f"--labels {path} names {len(unknown)} files not in {source.root}, such as {unknown[0]!r}")
    source.labels[:] = [labels[name] for name in source.names]


def folder_members(top: Path) -> Iterator[Member]:
    """Files and folders below ``top``, links followed, hidden ones left out.

    Names of images at which there is no file (a link that leads nowhere, a pipe) are yielded with size and stamp 0, so
    that whoever reads them finds them unreadable.
    """
    waiting = [("", (_inode(os.stat(top)),))]
    while waiting:
        prefix, above = waiting.pop()
        with os.scandir(top / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name, is_image = prefix + entry.name, entry.name.lower().endswith(tuple(EXTENSIONS))
                try:
                    status = entry.stat()
                except OSError as problem:
                    if not is_image:  # it may be a folder of images
                        fault = f"{name!r} cannot be read: {problem.strerror}"
                        raise UserError(f"--data {top}: {fault}; mend or remove it") from problem
                    yield name, 0, 0, ()
                    continue
                if stat.S_ISDIR(status.st_mode):
                    if _inode(status) in above:
                        raise UserError(f"--data {top}: {name} is a link to a folder that it lies in; remove it")
                    yield name + "/", 0, 0, ()
                    waiting.append((name + "/", (*above, _inode(status))))
                elif is_image:
                    size, stamp = (status.st_size, int(status.st_mtime)) if stat.S_ISREG(status.st_mode) else (0, 0)
                    yield name, size, stamp, ()


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


LISTERS = {"folder": folder_members, "tar": tar_members, "zip": zip_members}
READERS = {"tar": read_tar, "zip": read_zip}
