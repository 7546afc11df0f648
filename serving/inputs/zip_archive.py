"""List and read the images in zip archives, without unpacking.

The directory at the end of a zip is read entry by entry, so that a million entries need little
memory. Python's `zipfile` keeps all of them as objects. An archive may be larger than
4 GB (zip64), and may begin with other data, as self-extracting archives do.

A name is UTF-8 if its entry says so or if its bytes are (macOS does not set the mark); otherwise it
is in code page 437, the default of the format.
"""

from __future__ import annotations

import bz2
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs.archive_members import Member, Wanted, is_listed, unique
from serving.inputs.compression import ALLOWANCE, FIXED, MAX_FILE, MAX_RATIO
from serving.utils.regular_files import open_regular

SUFFIXES: Final = (".zip",)

MAX_ENTRIES: Final = 4_000_000
MAX_DIRECTORY: Final = 2**30
"""Largest number of entries of a zip, and largest size of its directory in bytes."""

_STARTS: Final = (b"PK\3\4", b"PK\5\6")  # the second: an archive without members

# Formats and sizes of APPNOTE.TXT, the specification of the format.
_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_MAX_COMMENT: Final = 2**16 - 1
_IN_ZIP64: Final = 2**32 - 1

_ENCRYPTED, _UTF8 = 1, 2**11
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075
_UNIX: Final = (3, 19)  # systems whose entries have the mode of a file: Unix and macOS
_DOS: Final = (0, 10, 11, 14)  # systems whose programs may write `\` between folders

_NO_ZIP: Final = "broken, or no zip archive: it has no directory at its end; it may be cut off"
_METHODS: Final = {
    **{1: "Shrink", 6: "Implode", 9: "Deflate64", 14: "LZMA", 93: "Zstandard", 95: "XZ"},
    **{97: "WavPack", 98: "PPMd", 99: "AES"},
}


class ZipEntry(NamedTuple):
    """An entry of the directory of a zip.

    Attributes:
        name: Name of the member, with `/` between folders.
        raw_name: The name as its bytes in the archive.
        flags: Bits of the entry; the lowest says that the member is encrypted.
        method: Number of the compression method.
        crc: CRC-32 of the member.
        packed, size: Bytes in the archive, and of the member.
        header: Offset of the member's own header, in bytes.
        mode: Mode of the file on Unix; 0 if the entry has none.
        length: Bytes of the entry.
    """

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int
    mode: int
    length: int


class _Directory(NamedTuple):
    """Where the directory of a zip lies.

    Attributes:
        start, size: Offset and number of bytes.
        entries: Number of entries.
        before: Bytes of other data before the archive, by which its offsets are too small.
    """

    start: int
    size: int
    entries: int
    before: int


def is_zip(path: str) -> bool:
    """Check whether a file is a zip: by its first bytes, or by its suffix if it has others.

    Raises:
        OSError: The file can't be opened.
    """
    with open_regular(Path(path)) as file:
        return file.read(4) in _STARTS or path.lower().endswith(SUFFIXES)


def check(path: str) -> None:
    """Check that a zip has a directory, as `members` does.

    Raises:
        DataError: It has none, or one beyond the limits.
        OSError: The file can't be opened.
    """
    with open_regular(Path(path)) as file:
        _find_directory(file)


def members(path: str, wanted: Wanted = is_listed) -> Iterator[Member]:
    """Yield the images of a zip, in the order of its directory.

    Raises:
        DataError: The archive is corrupt, truncated, of several parts, or expands too much; members
            that were yielded before are valid.
        OSError: The archive can't be opened.
    """
    counts: dict[str, int] = {}
    with open_regular(Path(path)) as file:
        limit = ALLOWANCE + MAX_RATIO * os.fstat(file.fileno()).st_size
        for offset, entry in entries(file):
            if wanted(entry.name):
                limit -= entry.size
                if limit < 0:
                    raise DataError(
                        f"it expands to more than {MAX_RATIO} times its size; unpack it"
                    )
                read = partial(read_member, file, entry)
                name, encrypted = unique(entry.name, counts), bool(entry.flags & _ENCRYPTED)
                yield Member(name, offset, read, entry.name, entry.size, encrypted)


def entries(file: BinaryIO) -> Iterator[tuple[int, ZipEntry]]:
    """Yield all entries of the directory of a zip that are no folders, each with its offset.

    Args:
        file: The archive. It may be read elsewhere between two entries.

    Raises:
        DataError: The archive is corrupt, truncated, or of several parts.
    """
    directory = _find_directory(file)
    at, name = directory.start, ""
    for _ in range(directory.entries):
        file.seek(at)
        entry = _read_entry(file, directory.before)
        if entry is None or at + entry.length > directory.start + directory.size:
            place = f"after {name}; what follows is left out" if name else "at its start"
            raise DataError(f"broken: its directory can't be read {place}")
        name = entry.name
        if not name.endswith("/"):
            yield at, entry
        at += entry.length


def bytes_before(path: str) -> int:
    """Return the number of bytes of other data before a zip, by which its offsets are too small.

    Raises:
        DataError: The archive is corrupt, truncated, or of several parts.
        OSError: The file can't be opened.
    """
    with open_regular(Path(path)) as file:
        return _find_directory(file).before


def read_member_at(file: BinaryIO, offset: int, before: int = 0) -> bytes:
    """Return the bytes of one member of a zip.

    Args:
        file: The archive.
        offset: Offset of the entry in the directory, in bytes.
        before: Result of `bytes_before`.

    Raises:
        BrokenImage: The member can't be read.
        TooLarge: The member has more than `MAX_FILE` bytes.
    """
    try:
        file.seek(offset)
        entry = _read_entry(file, before)
    except OSError as error:
        raise BrokenImage(f"can't be read: {error.strerror or error}") from error
    if entry is None:
        raise BrokenImage("the archive has changed")
    return read_member(file, entry)


def read_member(file: BinaryIO, entry: ZipEntry) -> bytes:
    """Return the bytes of one member of a zip.

    Args:
        file: The archive.
        entry: Entry of the member, as `entries` yields it.

    Raises:
        BrokenImage: The member can't be read, is encrypted, or is no file.
        TooLarge: The member has more than `MAX_FILE` bytes.
    """
    kind = stat.S_IFMT(entry.mode)
    if kind not in (0, stat.S_IFREG):
        what = "a link" if kind == stat.S_IFLNK else "a device or a pipe"
        raise BrokenImage(f"not a file but {what} in an archive")
    if entry.flags & _ENCRYPTED:
        raise BrokenImage("encrypted; unpack the archive with its password")
    unpack = _UNPACK.get(entry.method)
    if unpack is None:
        method = _METHODS.get(entry.method, f"method {entry.method}")
        raise BrokenImage(f"compressed by {method}, which is not read; unpack the archive")
    if max(entry.size, entry.packed) > MAX_FILE:
        size = max(entry.size, entry.packed)
        raise TooLarge(f"{size} bytes are more than the {MAX_FILE} {FIXED}")
    try:
        file.seek(entry.header)
        head = file.read(_LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
            raise BrokenImage("the archive has no member where its directory says")
        *_, name_length, extra_length = _LOCAL.unpack(head)
        if file.read(name_length) != entry.raw_name:
            raise BrokenImage("the archive has another member where its directory says")
        file.seek(extra_length, os.SEEK_CUR)
        packed = file.read(entry.packed)
        if len(packed) != entry.packed:
            raise BrokenImage(f"the archive has {len(packed)} of its {entry.packed} bytes")
        data = unpack(packed, entry.size + 1)
    except (OSError, ValueError, EOFError, OverflowError, zlib.error) as error:
        raise BrokenImage(f"can't be read: {' '.join(str(error).split())}") from error
    if len(data) != entry.size:
        more = "more than" if len(data) > entry.size else f"{len(data)} of"
        raise BrokenImage(f"the archive has {more} its {entry.size} bytes")
    if zlib.crc32(data) != entry.crc:
        raise BrokenImage("its checksum is wrong; the archive is damaged")
    return data


_UNPACK: Final[dict[int, Callable[[bytes, int], bytes]]] = {
    0: lambda packed, most: packed[:most],
    8: lambda packed, most: zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most),
    12: lambda packed, most: bz2.BZ2Decompressor().decompress(packed, most),
}
"""Maps the number of a compression method to a function of the packed bytes, and of the largest
number of bytes to return."""


def _find_directory(file: BinaryIO) -> _Directory:
    """Find the directory, from the record at the end of the file.

    Raises:
        DataError: There is none, the archive is one of several parts, or the directory is beyond
            the limits.
    """
    size = file.seek(0, io.SEEK_END)
    tail_start = max(0, size - _END.size - _MAX_COMMENT - _LOCATOR.size - _END64.size)
    file.seek(tail_start)
    tail = file.read()
    at = _find_end(tail)
    if at < 0:
        raise DataError(_NO_ZIP)
    _, disk, first_disk, here, count, length, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if tail[max(0, at - _LOCATOR.size) : at].startswith(b"PK\6\7"):
        _, disk, stated, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        end, fields = _find_end64(file, disk, stated, end)
        _, _, _, _, disk, first_disk, here, count, length, start = fields
    if disk or first_disk or here != count:
        raise DataError("one part of an archive of several; join the parts, or unpack them")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise DataError(
            f"{count} members in a directory of {length} bytes are more than the {MAX_ENTRIES} "
            f"members and {MAX_DIRECTORY} bytes allowed; unpack it"
        )
    before = end - length - start
    if before < 0 or length < count * _ENTRY.size:
        raise DataError("broken: its directory lies behind its end")
    return _Directory(start + before, length, count, before)


def _find_end(tail: bytes) -> int:
    """Return the offset of the record that ends a zip, or -1."""
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        # A comment may contain the signature, too. The record ends with the length of the comment.
        if at + _END.size <= len(tail):
            (comment,) = struct.unpack_from("<H", tail, at + _END.size - 2)
            if at + _END.size + comment <= len(tail):
                return at
        at = tail.rfind(b"PK\5\6", 0, at)
    return -1


def _find_end64(file: BinaryIO, disk: int, stated: int, end: int) -> tuple[int, tuple[int, ...]]:
    """Return the offset and the fields of the record that ends a zip64.

    Args:
        file: The archive.
        disk: Number of the part that has the record.
        stated: Offset of the record, which is too small if other data is before the archive.
        end: Offset of the record that ends any zip.
    """
    if disk:
        raise DataError("one part of an archive of several; join the parts, or unpack them")
    for at in (end - _LOCATOR.size - _END64.size, stated):
        if 0 <= at <= end - _END64.size:
            file.seek(at)
            head = file.read(_END64.size)
            if head.startswith(b"PK\6\6"):
                return at, _END64.unpack(head)
    raise DataError("broken: it has no directory where its end says")


def _read_entry(file: BinaryIO, before: int) -> ZipEntry | None:
    """Read an entry of the directory; return None if there is no complete one."""
    head = file.read(_ENTRY.size)
    if len(head) < _ENTRY.size or not head.startswith(b"PK\1\2"):
        return None
    _, made_by, _, flags, method, _, _, crc, packed, size, *others = _ENTRY.unpack(head)
    name_length, extra_length, comment_length, _, _, attributes, header = others
    rest = name_length + extra_length + comment_length
    body = file.read(rest)
    if len(body) < rest:
        return None
    raw_name, extra = body[:name_length], body[name_length : name_length + extra_length]
    fields = dict(_extra_fields(extra))
    wide = fields.get(_ZIP64, b"")
    values = []
    for value in (size, packed, header):  # the order of the fields
        if value == _IN_ZIP64 and len(wide) >= 8:
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        values.append(value)
    size, packed, header = values
    system = made_by >> 8
    name = _decode_name(raw_name, flags, system, fields.get(_UNICODE_PATH, b""))
    mode = attributes >> 16 if system in _UNIX else 0
    length = _ENTRY.size + rest
    return ZipEntry(name, raw_name, flags, method, crc, packed, size, header + before, mode, length)


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        yield kind, extra[at + 4 : at + 4 + size]
        at += 4 + size


def _decode_name(raw: bytes, flags: int, system: int, unicode_path: bytes) -> str:
    # The field has a version, the CRC-32 of the name that it replaces, and the name in UTF-8.
    if unicode_path[:5] == b"\1" + zlib.crc32(raw).to_bytes(4, "little"):
        raw, flags = unicode_path[5:], flags | _UTF8
    if flags & _UTF8:
        name = raw.decode("utf-8", "surrogateescape")
    else:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            name = raw.decode("cp437")
    return name.replace("\\", "/") if system in _DOS and "/" not in name else name
