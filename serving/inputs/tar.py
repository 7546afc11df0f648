"""Tar archives, such as WebDataset's shards: list and read the images in them without unpacking.

    a.tar::cat/1.jpg      the member cat/1.jpg of a.tar
    a.tar::2::cat/1.jpg   the second member of that name

No member is written to disk, so a name such as `../../x.jpg` is harmless. Members with the suffix
of an image are listed, except hidden ones, such as macOS's `._x.jpg`, in the order of the archive.
An archive may be compressed by gzip, bzip2, xz, or zstd if the package zstandard is installed; its
first bytes determine the compression.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs.compression import BLOCK, MAX_FILE, PeekableStream, open_tar
from serving.inputs.folders import Note, is_image

SEPARATOR: Final = "::"

SUFFIXES: Final = (
    *(".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    *(".tgz", ".tbz2", ".txz", ".tzst"),
)

_PIECE: Final = 2**16

# What tarfile and the decompressors raise for corrupt data.
_CORRUPT: Final = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class TarMember:
    """One image of an archive.

    Attributes:
        name: Name of the member, unique in the archive.
        offset: Offset of the member's header, in bytes of the uncompressed tar.
        read: Returns the member's bytes, or raises BrokenImage or TooLarge; valid until the
            iterator advances to the next member.
    """

    name: str
    offset: int
    read: Callable[[], bytes]


def names(path: str, note: Note) -> Iterator[str]:
    """`ARCHIVE::MEMBER` for every image of an archive; only the headers are read."""
    try:
        for member in members(path):
            name = f"{path}{SEPARATOR}{member.name}"
            if os.path.lexists(name):  # `split` would take the name for that file
                note(f"{name}: a file beside the archive has that name; the member is left out")
            else:
                yield name
    except DataError as error:
        note(f"{path}: {error}")
    except OSError as error:
        note(f"{path}: can't be read: {error.strerror or error}")


def split(name: str) -> tuple[str, str] | None:
    """(archive, member), or None if the name is a plain path.

    An existing file of exactly that name takes precedence. Otherwise the archive is the shortest
    prefix before a `::` that has the suffix of an archive and exists.
    """
    at = name.find(SEPARATOR)
    if at < 0 or os.path.lexists(name):
        return None
    while at >= 0:
        if is_archive(name[:at]) and os.path.isfile(name[:at]):
            return name[:at], name[at + len(SEPARATOR) :]
        at = name.find(SEPARATOR, at + 1)
    return None


def is_archive(path: str) -> bool:
    """Whether a name has the suffix of a tar archive."""
    return path.lower().endswith(SUFFIXES)


def is_compressed(path: str) -> bool:
    """Whether an archive is compressed, and so can only be read sequentially.

    Raises:
        DataError: The package for the compression is not installed.
        OSError: The archive can't be opened.
    """
    with open_tar(path) as source:
        return not source.seekable_file


def members(path: str) -> Iterator[TarMember]:
    """The images of an archive in its order.

    The names are kept in memory, because a repeated name gets a number.

    Raises:
        DataError: The archive is corrupt or truncated; the members before that point are valid.
        OSError: The archive can't be opened.
    """
    counts: dict[str, int] = {}
    with open_tar(path) as source:
        for tar, info in _headers(source):
            if not info.isdir() and is_image(info.name) and not _is_hidden(info.name):
                name = _unique(info.name, counts)
                yield TarMember(name, info.offset, partial(_read_member, tar, info))


def read_member_at(file: BinaryIO, offset: int) -> bytes:
    """The bytes of the member whose header is at `offset` of an uncompressed archive.

    Raises:
        BrokenImage: The member can't be read.
        TooLarge: The member has more than `MAX_FILE` bytes.
    """
    file.seek(offset)
    try:
        tar = _tar(file)
        info = tar.next()
    except _CORRUPT as error:
        raise BrokenImage(f"can't be read: {_reason(error)}") from error
    if info is None:
        raise BrokenImage("the archive has changed")
    return _read_member(tar, info)


def _headers(source: PeekableStream) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield each header. Does not iterate TarFile, which keeps all and ignores corrupt headers."""
    tar: tarfile.TarFile | None = None
    offset, place = 0, "at its start: no tar archive"
    while True:
        try:
            source.seek(offset)
            block = source.peek()
            if not block.strip(b"\0"):
                break
            if tar is None:
                tar = _tar(source)
                info = tar.next()
            else:
                info = tarfile.TarInfo.fromtarfile(tar)
        except _CORRUPT as error:
            raise DataError(f"broken {place} ({_reason(error)})") from error
        if info is None or tar.offset <= offset:
            raise DataError(f"broken {place}")
        offset, place = tar.offset, f"after {info.name}; what follows is left out"
        yield tar, info
    if len(block) < BLOCK:
        raise DataError("cut off, it has no end mark; its last image may be broken")


def _tar(file: BinaryIO | PeekableStream) -> tarfile.TarFile:
    return tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if not info.isreg():
        kind = "a link" if info.issym() or info.islnk() else "a device or a pipe"
        raise BrokenImage(f"not a file but {kind} in an archive")
    if info.size > MAX_FILE:
        raise TooLarge(f"{info.size} bytes are more than the {MAX_FILE} allowed")
    data = b""
    try:
        file = tar.extractfile(info)
        if file is not None:
            data = b"".join(iter(partial(file.read, _PIECE), b""))
    except _CORRUPT as error:
        raise BrokenImage(f"can't be read: {_reason(error)}") from error
    if len(data) != info.size:
        raise BrokenImage(f"the archive has {len(data)} of its {info.size} bytes")
    return data


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _unique(name: str, counts: dict[str, int]) -> str:
    """The name; if it occurred before, `2::name` and so on."""
    unique = name
    while unique in counts:
        counts[name] += 1
        unique = f"{counts[name]}{SEPARATOR}{name}"
    counts[unique] = 1
    return unique


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
