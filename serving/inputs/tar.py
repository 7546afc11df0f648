"""List and read the images in tar archives, such as WebDataset shards, without unpacking.

An archive may be compressed by gzip, bzip2 or xz, or by zstd if the package zstandard is installed.
The compression is detected from the first bytes of the file.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from tarfile import XGLTYPE
from typing import IO, Any, BinaryIO, Final

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs.archive_members import Member, Wanted, is_listed, unique
from serving.inputs.compression import (
    BLOCK,
    FIXED,
    MAX_FILE,
    MAX_RATIO,
    NeedsMemory,
    PeekableStream,
    open_tar,
)

SUFFIXES: Final = (
    *(".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    *(".tgz", ".tbz2", ".txz", ".tzst"),
)

_NO_TAR: Final = ": no tar archive"
_PIECE: Final = 2**16

_LONGEST_NAME: Final = 4096
"""Characters of a member's name, as in a path of Linux: all names are kept."""

_HOLES: Final = 2**20
"""Bytes that a sparse member may have beyond `MAX_RATIO` times those in the archive."""

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


def is_compressed(path: str) -> bool:
    """Check whether an archive is compressed. A compressed archive can only be read sequentially.

    Raises:
        DataError: The archive is compressed by zstd, and the package zstandard is not installed.
        OSError: The archive can't be opened.
    """
    with open_tar(path) as source:
        return not source.seekable_file


def members(path: str, wanted: Wanted = is_listed) -> Iterator[Member]:
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
            if not info.isdir() and wanted(info.name):
                name = unique(info.name, counts)
                yield Member(
                    name, info.offset, partial(_read_member, tar, info), info.name, info.size
                )


def read_member_at(file: BinaryIO, offset: int) -> bytes:
    """Return the bytes of one member of an uncompressed archive.

    Args:
        file: The archive.
        offset: Offset of the member's header, in bytes.

    Raises:
        BrokenImage: The member can't be read.
        TooLarge: The member has more than `MAX_FILE` bytes.
    """
    source = PeekableStream(file, seekable_file=True)
    try:
        source.seek(offset)
        with source.header():
            tar = _tar(source)
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
    offset, place = 0, f"at its start{_NO_TAR}"
    while True:
        try:
            source.seek(offset)
            block = source.peek()
            if not block.strip(b"\0"):
                break
            with source.header():
                if tar is None:
                    tar = _tar(source)
                    info = tar.next()
                else:
                    info = _TarInfo.fromtarfile(tar)
        except NeedsMemory as error:
            raise DataError(f"can't be read {place.removesuffix(_NO_TAR)}: {error}") from error
        except _CORRUPT as error:
            raise DataError(f"broken {place} ({_reason(error)})") from error
        if info is None or tar.offset <= offset:
            raise DataError(f"broken {place}")
        if len(info.name) > _LONGEST_NAME:
            raise DataError(f"broken {place} (a name of {len(info.name)} characters)")
        offset, place = tar.offset, f"after {info.name}; what follows is left out"
        yield tar, info
    if len(block) < BLOCK:
        raise DataError("cut off, it has no end mark; its last image may be broken")


class _TarInfo(tarfile.TarInfo):
    """Header of a member, whose pax headers are checked before `tarfile` parses them."""

    def _proc_member(self, tarfile: Any) -> Any:
        # `tarfile` names this method as the one to override. Its first read is the pax header.
        if self.type in _PAX_TYPES:
            charset = tarfile.pax_headers.get("hdrcharset", _UTF8)
            is_global = self.type == XGLTYPE
            tarfile.fileobj.change_next = partial(_used_records, charset, is_global)
        return super()._proc_member(tarfile)  # type: ignore[misc]


_PAX_TYPES: Final = (tarfile.XHDTYPE, XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_UTF8: Final = "ISO-IR 10646 2000 UTF-8"
_USED: Final = frozenset({b"path", b"linkpath", b"size"})
_MAP: Final = b"GNU.sparse.map"
_SPARSE_SIZE: Final = b"GNU.sparse.size"
_USED_SPARSE: Final = frozenset(
    {
        _MAP,
        _SPARSE_SIZE,
        *(b"GNU.sparse." + key for key in (b"major", b"minor", b"name", b"realsize")),
    }
)
_SPARSE_BLOCKS: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def _used_records(charset: str, is_global: bool, body: bytes) -> bytes:
    """Return a pax header with only the records that matter for reading a member.

    `tarfile` searches a pax header by regular expressions that take quadratic time for a run of
    digits. They find nothing to search in what is returned: the character set comes first, and a
    sparse map of format 0.0 is made one of format 0.1.

    Args:
        charset: Value of `hdrcharset` if the header has none.
        is_global: Whether the header applies to all further members.
        body: The pax header, padded with zeros.

    Raises:
        ValueError: The header is no list of records.
    """
    used: list[bytes] = []
    keys: set[bytes] = set()
    blocks: dict[bytes, list[bytes]] = {key: [] for key in _SPARSE_BLOCKS}
    charsets: list[bytes] = []
    for key, value in _records(body):
        if key in _USED or (key in _USED_SPARSE and not is_global):
            used.append(_record(key, value))
            keys.add(key)
        elif key in blocks and not is_global:
            blocks[key].append(value)
        elif key == b"hdrcharset" and value:
            charsets.append(value)
    if _SPARSE_SIZE in keys and _MAP not in keys:
        pairs = [b",".join(pair) for pair in zip(*blocks.values(), strict=False)]
        used.append(_record(_MAP, b",".join(pairs) or b"0,0"))
    first = charsets[0] if charsets else charset.encode()
    return b"".join([_record(b"hdrcharset", first), *used])


def _records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key and the value of each record of a pax header: LENGTH KEY=VALUE, line break."""
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 8)
        digits = body[at : max(space, at)]
        end = at + (int(digits) if digits.isdigit() else 0)
        if not at < space < end <= len(body) or body[end - 1] != ord("\n"):
            raise ValueError("a pax header that is no list of records")
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not (key and equals):
            raise ValueError("a pax record that has no key or no value")
        yield key, value
        at = end


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    return b"%d" % (len(rest) + len(str(len(rest) + len(str(len(rest)))))) + rest


def _tar(file: PeekableStream) -> tarfile.TarFile:
    return tarfile.TarFile(
        fileobj=file, tarinfo=_TarInfo, encoding="utf-8", errors="surrogateescape"
    )


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if not info.isreg():
        kind = "a link" if info.issym() or info.islnk() else "a device or a pipe"
        raise BrokenImage(f"not a file but {kind} in an archive")
    if info.size > MAX_FILE:
        raise TooLarge(f"{info.size} bytes are more than the {MAX_FILE} {FIXED}")
    if info.sparse is not None:
        header: Any = info
        header.sparse = _checked_sparse(header.sparse, info.size)
    data = b""
    try:
        file = tar.extractfile(info)
        if file is not None:
            data = file.read(_PIECE)
            if len(data) < info.size:
                data = _rest(data, file)
    except _CORRUPT as error:
        raise BrokenImage(f"can't be read: {_reason(error)}") from error
    if len(data) != info.size:
        raise BrokenImage(f"the archive has {len(data)} of its {info.size} bytes")
    return data


def _rest(data: bytes, file: IO[bytes]) -> bytes:
    """Return `data` and what follows it in a file. A join of pieces would hold the bytes twice."""
    buffer = io.BytesIO()
    while data:
        buffer.write(data)
        data = file.read(_PIECE)
    return buffer.getvalue()


def _checked_sparse(blocks: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Check the map of a sparse member, whose holes are zeros that are not in the archive.

    Args:
        blocks: Offset and size of each block of data.
        size: Size of the member with its holes, in bytes.

    Returns:
        The blocks that are not empty.

    Raises:
        BrokenImage: The blocks are not in order, or lie behind the end.
        TooLarge: The member is almost nothing but holes.
    """
    blocks = [(offset, length) for offset, length in blocks if length]
    end = stored = 0
    for offset, length in blocks:
        if offset < end or length < 0:
            raise BrokenImage("a sparse file whose blocks are not in order")
        end, stored = offset + length, stored + length
    if end > size:
        raise BrokenImage("a sparse file whose blocks lie behind its end")
    if size > _HOLES + MAX_RATIO * stored:
        raise TooLarge(f"{size} bytes from {stored}: more than {MAX_RATIO} times as many")
    return blocks


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
