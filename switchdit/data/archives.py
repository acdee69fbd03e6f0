"""Tar and zip archives, read in place: members are listed once, then any process reads any of them by its offset.

Nothing is ever unpacked to disk. A member that is no plain file or folder, or whose name leads elsewhere, is refused.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from switchdit.errors import UserError

# What listing yields for each member: its name (a folder's ends in "/"), its size in bytes, a stamp that changes when
# it is replaced (in a zip its CRC32, in a tar its time), and its place, the integers by which `read_tar` or `read_zip`
# finds it.
Member = tuple[str, int, int, tuple[int, ...]]

LARGEST_FILE = 1 << 30  # bytes; nothing that large is one image, and a member that says so may be a bomb
COMPRESSED = {
    b"\x1f\x8b": "gzip -dk",
    b"BZh": "bzip2 -dk",
    b"\xfd7zXZ\0": "xz -dk",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}


def kind_of(path: Path) -> str:
    """ "folder", "tar" or "zip"; `UserError` for anything else."""
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise UserError(f"--data {path} is not there")
    start = _start_of(path)
    for magic, command in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"--data {path} is compressed, so its images cannot be read one by one; run '{command} {path}' "
                "and give the .tar"
            )
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if len(start) == BLOCK and _checksum_holds(start):
        return "tar"
    raise UserError(f"--data {path} is a file, but neither a .tar nor a .zip archive")


def _start_of(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"--data {path} is a device or a pipe; give a folder, a .tar or a .zip")
    with open(path, "rb") as file:
        return file.read(BLOCK)


def _refuse(archive: Path, name: str, fault: str) -> NoReturn:
    raise UserError(f"--data {archive}: its member {name!r} {fault}")


def plain_name(archive: Path, name: str) -> str:
    """The name without a leading "./", "" for the top; `UserError` when it is absolute, leads upwards or is no path."""
    if name in (".", "/"):
        return ""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    if name.startswith("/"):
        _refuse(archive, name, "has an absolute path")
    parts = name.removesuffix("/").split("/")
    if ".." in parts:
        _refuse(archive, name, "leads out of the archive ('..')")
    if name and ("" in parts or "." in parts or "\0" in name):
        _refuse(archive, name, "has no proper path")
    return name


@lru_cache(maxsize=4)
def _descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


# ---------------------------------------------------------------------------------------------------- tar

BLOCK = 512
LARGEST_HEADER = 1 << 20  # bytes of a long name or of pax records
LARGEST_RECORD = 1 << 20  # bytes that a tar's length is filled up to a multiple of; GNU's and Python's is 10240
PLAIN, FOLDER, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = (b"0", b"\0", b"7"), b"5", b"L", b"K", b"x", b"g"
KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


def tar_members(path: Path) -> Iterator[Member]:
    """Members of an uncompressed tar; those of tars inside it, such as ImageNet's, under the inner tar's name."""
    end = path.stat().st_size
    with open(path, "rb") as file:
        for name, size, stamp, place in _tar_between(path, file.fileno(), 0, end):
            if not name.endswith(".tar"):
                yield name, size, stamp, place
                continue
            folder = name.removesuffix(".tar")
            for inner, *rest in _tar_between(path, file.fileno(), place[0], place[0] + size):
                yield f"{folder}/{inner}", *rest


def _tar_between(path: Path, descriptor: int, position: int, end: int) -> Iterator[Member]:
    """Written out because the standard library's tarfile takes over a minute for ImageNet's 1.28 million members, and
    takes a damaged header for the end of the archive."""
    long_name = long_size = None
    while True:
        header = os.pread(descriptor, BLOCK, position)
        if position + BLOCK > end or len(header) < BLOCK:
            raise UserError(f"--data {path} is cut off: the mark of a tar's end is missing at byte {position}")
        if not any(header):
            _check_end(path, descriptor, position, end)
            return
        if not _checksum_holds(header):
            raise UserError(f"--data {path} is damaged: no valid tar header at byte {position}")
        kind, start = header[156:157], position + BLOCK
        size = _number(header[124:136], path, position)
        extended = kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL)
        if not extended:
            size = size if long_size is None else long_size
        position = start + -(-size // BLOCK) * BLOCK
        if position > end:
            raise UserError(f"--data {path} is cut off: it ends before byte {position}")
        if extended:
            if size > LARGEST_HEADER:
                raise UserError(f"--data {path} is damaged: a tar header of {size} bytes at byte {start - BLOCK}")
            data = os.pread(descriptor, size, start)
            if kind == LONG_NAME:
                long_name = data.rstrip(b"\0")
            elif kind == PAX:
                records = _pax_records(data, path, start)
                long_name = records.get(b"path", long_name)
                long_size = _decimal(records[b"size"], path, start) if b"size" in records else long_size
            continue
        name = _text(long_name if long_name is not None else _short_name(header))
        long_name = long_size = None
        if kind not in PLAIN and kind != FOLDER:
            _refuse(path, name, f"is {KINDS.get(kind, f'of the unknown kind {kind!r}')}, not a file or folder")
        name = plain_name(path, name)
        if kind == FOLDER and name:
            name = name.removesuffix("/") + "/"
        yield name, size, _seconds(header[136:148]), (start, size)


def _check_end(path: Path, descriptor: int, position: int, end: int) -> None:
    """`UserError` unless the zeros at ``position`` are those that end a tar: two blocks and what fills a record.

    Other zeros are holes, such as those of a download that reserves its space first. A hole at the very end that is
    no longer than a record cannot be told from the end of a sound tar of fewer images.
    """
    rest = os.pread(descriptor, min(end - position, LARGEST_RECORD + BLOCK), position)
    zeros = len(rest) - len(rest.lstrip(b"\0"))
    if zeros == end - position:
        if zeros < 2 * BLOCK:
            raise UserError(f"--data {path} is cut off: a tar ends with two blocks of zeros, not one, at {position}")
        return
    whole = zeros // BLOCK * BLOCK
    if whole >= 2 * BLOCK and _checksum_holds(rest[whole : whole + BLOCK]):
        raise UserError(
            f"--data {path}: more follows after its end, at byte {position + whole}; "
            "is it damaged, or joined by 'cat'? Join archives with 'tar -Af'"
        )
    raise UserError(f"--data {path} is damaged or half-downloaded: zeros at byte {position}, where a header belongs")


def read_tar(path: str, place: tuple[int, ...]) -> bytes:
    """The content of a member; ValueError when it is not all there."""
    offset, size = place
    return _bytes_at(path, offset, size)


def _bytes_at(path: str, offset: int, size: int) -> bytes:
    if size > LARGEST_FILE:
        raise ValueError(f"{size} bytes are too many for an image")
    data = os.pread(_descriptor(path), size, offset)
    if len(data) != size:
        raise ValueError("the archive is cut off")
    return data


def _checksum_holds(header: bytes) -> bool:
    try:
        return int(header[148:156].strip(b"\0 "), 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _number(field: bytes, path: Path, position: int) -> int:
    """Octal digits or, for 8 GiB and more, a big-endian number after a byte 0x80."""
    try:
        value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"--data {path} is damaged: no valid size in the tar header at byte {position}")
    return value


def _seconds(field: bytes) -> int:
    """A time; for what is no octal number, such as years before 1970, any number that stands for the field."""
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return int.from_bytes(field, "big")


def _decimal(digits: bytes, path: Path, position: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise UserError(f"--data {path} is damaged: no valid size in the tar header at byte {position}")
    return int(digits)


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax_records(data: bytes, path: Path, position: int) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n", one after the other."""
    records, rest = {}, data
    while rest.strip(b"\0"):
        digits = rest.split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = rest[len(digits) + 1 : length].partition(b"=")
        if length > len(rest) or not equals or not value.endswith(b"\n"):
            raise UserError(f"--data {path} is damaged: no valid pax header at byte {position}")
        if key.startswith(b"GNU.sparse"):
            raise UserError(f"--data {path} holds a sparse file (at byte {position}); pack it with plain files")
        records[key], rest = value[:-1], rest[length:]
    return records


# ---------------------------------------------------------------------------------------------------- zip

PACKING = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def zip_members(path: Path) -> Iterator[Member]:
    """Members of a zip, stored or deflated."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as problem:
        raise UserError(f"--data {path} is cut off or damaged: {str(problem).splitlines()[0]}") from problem
    end = path.stat().st_size
    for member in members:
        name = plain_name(path, member.filename)
        mode = stat.S_IFMT(member.external_attr >> 16)
        if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            _refuse(path, name, f"is {'a link' if mode == stat.S_IFLNK else 'a device'}, not a file or folder")
        if member.flag_bits & 1:
            _refuse(path, name, "is encrypted")
        if member.compress_type not in PACKING:
            _refuse(path, name, f"is packed by method {member.compress_type}; only stored and deflated can be read")
        if not 0 <= member.header_offset < end or member.compress_size > end:
            _refuse(path, name, "lies outside of the archive, which is cut off or damaged")
        place = (member.header_offset, member.compress_size, member.file_size, member.CRC, member.compress_type)
        yield name, member.file_size, member.CRC, place


def read_zip(path: str, place: tuple[int, ...]) -> bytes:
    """The content of a member; ValueError when it is not what the archive's directory says."""
    offset, packed, size, checksum, method = place
    if size > LARGEST_FILE or offset < 0:
        raise ValueError(f"{size} bytes at byte {offset} are no image")
    header = _bytes_at(path, offset, 30)
    if header[:4] != b"PK\3\4":
        raise ValueError("the archive is damaged: no zip header where its directory says")
    data = _bytes_at(path, offset + 30 + sum(struct.unpack("<HH", header[26:30])), packed)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # never more than it said
    if len(data) != size or zlib.crc32(data) != checksum:
        raise ValueError("size or checksum is not what the archive's directory says")
    return data
