"""Zip archives for tests: whole ones by Python's zipfile, and records with any values."""

import struct
import zipfile
import zlib
from collections.abc import Iterable


def write_zip(
    name: str,
    members: Iterable[tuple[str, bytes]],
    method: int = zipfile.ZIP_STORED,
    comment: bytes = b"",
) -> str:
    """Write an archive of (name, bytes) pairs; a name that ends with "/" is a folder."""
    with zipfile.ZipFile(name, "w") as archive:
        for member, data in members:
            archive.writestr(zipfile.ZipInfo(member), data, method)
        archive.comment = comment
    return name


def local(
    name: bytes, data: bytes, *, flags: int = 0, method: int = 0, size: int | None = None
) -> bytes:
    """The header of a member, and its data."""
    unpacked = len(data) if size is None else size
    head = (20, flags, method, 0, 33, zlib.crc32(data), len(data), unpacked, len(name), 0)
    return struct.pack("<4s5H3L2H", b"PK\3\4", *head) + name + data


def entry(
    name: bytes,
    data: bytes,
    *,
    flags: int = 0,
    method: int = 0,
    system: int = 3,
    size: int | None = None,
    extra: bytes = b"",
    in_zip64: bool = False,
) -> bytes:
    """The entry in the directory of a member whose header is at the start of the archive."""
    sizes = (len(data), len(data) if size is None else size)
    header = 0
    if in_zip64:
        sizes, header = (2**32 - 1,) * 2, 2**32 - 1
    fixed = struct.pack(
        "<4s6H3L5H2L",
        *(b"PK\1\2", system << 8 | 20, 20, flags, method, 0, 33, zlib.crc32(data), *sizes),
        *(len(name), len(extra), 0, 0, 0, 0, header),
    )
    return fixed + name + extra


def end_record(entries: int, size: int, start: int, disk: int = 0) -> bytes:
    """The record at the end, for a directory of `size` bytes that begins at `start`."""
    return struct.pack("<4s4H2LH", b"PK\5\6", disk, disk, entries, entries, size, start, 0)
