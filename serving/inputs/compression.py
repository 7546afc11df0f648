"""Open a tar file, compressed or not, as a stream that Python's module `tarfile` can read."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from serving.errors import DataError
from serving.imaging.limits import MAX_PIXELS
from serving.utils.optional_packages import require
from serving.utils.regular_files import open_regular

BLOCK: Final = tarfile.BLOCKSIZE

MAX_FILE: Final = 4 * MAX_PIXELS
"""Largest file that is read, in bytes: the largest allowed image, uncompressed in RGBA."""

FIXED: Final = "allowed, which no option raises"

MAX_HEADER: Final = 2**20
"""Largest size in bytes of all headers of a member: long names, pax headers, sparse maps."""

MAX_RATIO: Final = 250
ALLOWANCE: Final = 2**25
"""A compressed archive may expand to `MAX_RATIO` times its size, and this many bytes more."""

MAX_UNPACKING: Final = 2**28
"""Largest memory for decompressing xz, in bytes. `xz -9` needs 65 MB; the format allows 4 GB."""

_PIECE: Final = 2**16


class NeedsMemory(lzma.LZMAError):
    """Decompressing a file needs more than `MAX_UNPACKING` bytes of memory."""


class PeekableStream(io.BufferedIOBase):
    """Binary stream whose next block can be read without advancing.

    Attributes:
        seekable_file: Whether the underlying file can seek. If False, `seek` can only go forward,
            by reading the bytes up to the new position.
        change_next: Function whose result the next `read` returns in place of the bytes that were
            read. None: the bytes themselves.
    """

    def __init__(
        self, raw: BinaryIO, *, seekable_file: bool, compressed: BinaryIO | None = None
    ) -> None:
        """Store the files.

        Args:
            raw: The file, or the stream of decompressed bytes.
            seekable_file: Whether `raw` can seek.
            compressed: The compressed file that `raw` reads. None: it is not compressed.
        """
        self._raw, self.seekable_file, self._compressed = raw, seekable_file, compressed
        self._position, self._peeked = 0, b""
        self._header_left: int | None = None
        self.change_next: Callable[[bytes], bytes] | None = None

    @contextlib.contextmanager
    def header(self) -> Iterator[None]:
        """Return a context in which the headers of one member are read, of limited size."""
        self._header_left = MAX_HEADER + 16 * BLOCK
        try:
            yield
        finally:
            self._header_left = self.change_next = None

    def peek(self) -> bytes:
        """Return the next `BLOCK` (512) bytes without advancing; fewer at the end of the stream."""
        self._peeked += self._raw.read(BLOCK - len(self._peeked))
        return self._peeked

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes; fewer at the end of the stream.

        Raises:
            ValueError: `size` is not from 0 to `MAX_FILE`, which a corrupt tar header can request;
                the header of a member is too large; or the archive expands too much.
        """
        if size is None or not 0 <= size <= MAX_FILE:
            raise ValueError("a size out of range")
        if self._header_left is not None:
            self._header_left -= size
            if self._header_left < 0:
                raise ValueError(f"a header of more than {MAX_HEADER} bytes")
        data, self._peeked = self._peeked[:size], self._peeked[size:]
        if len(data) < size:
            data += self._raw.read(size - len(data))
        self._position += len(data)
        if self._compressed and self._position > ALLOWANCE:
            size = self._compressed.tell()
            if self._position > ALLOWANCE + MAX_RATIO * size:
                raise ValueError(f"it expands to more than {MAX_RATIO} times its size; unpack it")
        if self.change_next:
            data, self.change_next = self.change_next(data), None
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, to: int, whence: int = 0, /) -> int:
        """Go to position `to`, in bytes from the start, and return the position reached.

        A compressed stream can't go back; a smaller `to` then leaves the position unchanged.
        """
        if self.seekable_file and to != self._position:
            self._raw.seek(to)
            self._position, self._peeked = to, b""
        while self._position < to and self.read(min(to - self._position, _PIECE)):
            pass
        return self._position


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[PeekableStream]:
    """Open a tar file. The compression is detected from the first bytes of the file, not its name.

    Raises:
        DataError: The archive is compressed by zstd, and the package zstandard is not installed.
        OSError: The file can't be opened, or is no regular file.
    """
    with open_regular(Path(path)) as file:
        start = file.read(BLOCK)
        file.seek(0)
        # A plain tar starts with a file name, which may begin with a compression's magic bytes.
        plain = start[257:262] == b"ustar"
        kinds = (opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic))
        opener = None if plain else next(kinds, None)
        if opener is None:
            yield PeekableStream(file, seekable_file=True)
        else:
            with opener(file) as stream:
                yield PeekableStream(stream, seekable_file=False, compressed=file)


def _gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _zstd(file: BinaryIO) -> Any:
    remedy = "pip install zstandard, or unpack it with zstd -d"
    require("zstandard", "compressed by zstd, which", remedy, error=DataError)
    return io.BufferedReader(_ZstdReader(importlib.import_module("zstandard"), file))


def _xz(file: BinaryIO) -> Any:
    return io.BufferedReader(_XzReader(file))


class _XzReader(io.RawIOBase):
    """Stream decompressed by lzma within `MAX_UNPACKING` bytes; `lzma.LZMAFile` has no limit.

    Like there, streams may follow each other, and what follows and is none is ignored.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = _xz_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data
                if len(data) < len(_XZ):
                    data += self._file.read(_PIECE)
                if not data.startswith(_XZ):
                    return 0
                self._decompressor = _xz_decompressor()
            elif self._decompressor.needs_input and not (data := self._file.read(_PIECE)):
                raise EOFError("the compressed data is cut off")
            try:
                found = self._decompressor.decompress(data, len(buffer))
            except lzma.LZMAError as error:
                if "emory" not in str(error):
                    raise
                limit = MAX_UNPACKING >> 20
                raise NeedsMemory(f"unpacking it needs more than {limit} MB; unpack it") from error
            if found:
                buffer[: len(found)] = found
                return len(found)


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_UNPACKING)


class _ZstdReader(io.RawIOBase):
    """Stream decompressed by zstandard. Errors of that package are raised as OSError."""

    def __init__(self, package: Any, file: BinaryIO) -> None:
        self._error = package.ZstdError
        self._reader = package.ZstdDecompressor().stream_reader(file, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            return int(self._reader.readinto(buffer))
        except self._error as error:
            raise OSError(str(error)) from error


_XZ: Final = b"\xfd7zXZ\0"
_COMPRESSIONS: Final[dict[bytes, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": bz2.BZ2File,
    _XZ: _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""Maps the first bytes of a compressed file to a function that opens it."""
