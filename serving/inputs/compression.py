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
from typing import Any, BinaryIO, Final

from serving.errors import DataError
from serving.imaging.decode import MAX_PIXELS
from serving.utils.optional_packages import require

BLOCK: Final = tarfile.BLOCKSIZE

MAX_FILE: Final = 4 * MAX_PIXELS
"""Largest file that is read, in bytes: the largest allowed image, uncompressed in RGBA."""

_PIECE: Final = 2**16


class PeekableStream(io.BufferedIOBase):
    """Binary stream whose next block can be read without advancing.

    Attributes:
        seekable_file: Whether the underlying file can seek. If False, `seek` can only go forward,
            by reading the bytes up to the new position.
    """

    def __init__(self, raw: BinaryIO, *, seekable_file: bool) -> None:
        self._raw, self.seekable_file = raw, seekable_file
        self._position, self._peeked = 0, b""

    def peek(self) -> bytes:
        """Return the next `BLOCK` (512) bytes without advancing; fewer at the end of the stream."""
        self._peeked += self._raw.read(BLOCK - len(self._peeked))
        return self._peeked

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes; fewer at the end of the stream.

        Raises:
            ValueError: `size` is not from 0 to `MAX_FILE`. A corrupt tar header can request this.
        """
        if size is None or not 0 <= size <= MAX_FILE:
            raise ValueError("a size out of range")
        data, self._peeked = self._peeked[:size], self._peeked[size:]
        if len(data) < size:
            data += self._raw.read(size - len(data))
        self._position += len(data)
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
        OSError: The file can't be opened.
    """
    with open(path, "rb") as file:
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
                yield PeekableStream(stream, seekable_file=False)


def _gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _zstd(file: BinaryIO) -> Any:
    remedy = "pip install zstandard, or unpack it with zstd -d"
    require("zstandard", "compressed by zstd, which", remedy, error=DataError)
    return io.BufferedReader(_ZstdReader(importlib.import_module("zstandard"), file))


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


_COMPRESSIONS: Final[dict[bytes, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""Maps the first bytes of a compressed file to a function that opens it."""
