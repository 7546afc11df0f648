"""List and read the images in tar archives, such as WebDataset shards, without unpacking.

    a.tar::cat/1.jpg      the member cat/1.jpg of a.tar
    a.tar::2::cat/1.jpg   the second member of that name

Members that have an image suffix are listed in archive order. Hidden members, such as macOS's
`._x.jpg`, are left out. No member is written to disk, so a name such as `../../x.jpg` is harmless.

An archive may be compressed by gzip, bzip2 or xz, or by zstd if the package zstandard is installed.
The compression is detected from the first bytes of the file.
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
    """One image in a tar archive.

    Attributes:
        name: Name of the member, unique in the archive. The second member of the same name
            has the prefix `2::`, the third `3::`.
        offset: Offset of the member's header, in bytes of the uncompressed tar.
        read: Function that returns the bytes of the image. It can only be called until the iterator
            returned by `members` advances. Raises BrokenImage or TooLarge.
    """

    name: str
    offset: int
    read: Callable[[], bytes]


def names(path: str, note: Note) -> Iterator[str]:
    """Yield `ARCHIVE::MEMBER` for every image in an archive. Only the headers are read.

    Args:
        path: The archive.
        note: Called with a message about anything that is left out.
    """
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
    """Split `ARCHIVE::MEMBER` into the path of the archive and the name of the member.

    If `name` contains several `::`, the archive is the shortest prefix that exists and has the
    suffix of a tar archive.

    Returns:
        None if a file of exactly this name exists, or if `name` contains no such archive.
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
    """Check whether a name has the suffix of a tar archive, such as `.tar.gz`."""
    return path.lower().endswith(SUFFIXES)


def is_compressed(path: str) -> bool:
    """Check whether an archive is compressed. A compressed archive can only be read sequentially.

    Raises:
        DataError: The archive is compressed by zstd, and the package zstandard is not installed.
        OSError: The archive can't be opened.
    """
    with open_tar(path) as source:
        return not source.seekable_file


def members(path: str) -> Iterator[TarMember]:
    """Yield the images of an archive, in archive order.

    The names of all images so far are kept in memory, because a repeated name gets a number.

    Raises:
        DataError: The archive is corrupt or truncated (members yielded before are valid), or it is
            compressed by zstd and the package zstandard is not installed.
        OSError: The archive can't be opened.
    """
    counts: dict[str, int] = {}
    with open_tar(path) as source:
        for tar, info in _headers(source):
            if not info.isdir() and is_image(info.name) and not _is_hidden(info.name):
                name = _unique(info.name, counts)
                yield TarMember(name, info.offset, partial(_read_member, tar, info))


def read_member_at(file: BinaryIO, offset: int) -> bytes:
    """Return the bytes of one member of an uncompressed archive.

    Args:
        file: The archive.
        offset: Offset of the member's header, in bytes.

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
    """Yield the header of each member, with the TarFile that it was read from.

    Iterating over a TarFile instead would keep all headers in memory and ignore corrupt ones.
    """
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
    """Return `name`, or a numbered name such as `2::name` if `name` occurred before in the archive.

    `counts` maps each name so far to its number of occurrences, and is updated.
    """
    unique = name
    while unique in counts:
        counts[name] += 1
        unique = f"{counts[name]}{SEPARATOR}{name}"
    counts[unique] = 1
    return unique


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
