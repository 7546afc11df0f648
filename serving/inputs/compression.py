"""A file that may be compressed, as tarfile reads it: from the start on, with a look ahead."""

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
from serving.imaging import decode

BLOCK: Final = tarfile.BLOCKSIZE

# A file with more bytes than the largest picture has in RGBA is no photo: it is not read at all.
MAX_FILE: Final = 4 * decode.MAX_PIXELS

_PIECE: Final = 2**16


class PeekableStream(io.BufferedIOBase):
    """What tarfile reads from: looks a block ahead, and goes on by reading where it can't jump."""

    def __init__(self, raw: BinaryIO, *, jumps: bool) -> None:
        self._raw, self.jumps = raw, jumps
        self._at, self._ahead = 0, b""

    def peek(self) -> bytes:
        """The next block; less at the end."""
        self._ahead += self._raw.read(BLOCK - len(self._ahead))
        return self._ahead

    def read(self, size: int | None = -1, /) -> bytes:
        """As asked; no header needs more than a file may have."""
        if size is None or not 0 <= size <= MAX_FILE:
            raise ValueError("a size out of range")
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            data += self._raw.read(size - len(data))
        self._at += len(data)
        return data

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, to: int, whence: int = 0, /) -> int:
        """To a place from the start; in a stream only ahead."""
        if self.jumps and to != self._at:
            self._raw.seek(to)
            self._at, self._ahead = to, b""
        while self._at < to and self.read(min(to - self._at, _PIECE)):
            pass
        return self._at


@contextlib.contextmanager
def opened(path: str) -> Iterator[PeekableStream]:
    """Open a tar; its bytes tell how it is compressed.

    Raises:
        DataError: In a way that can't be read here.
        OSError: It can't be opened.
    """
    with open(path, "rb") as file:
        start = file.read(BLOCK)
        file.seek(0)
        # The first bytes of a plain tar are a name, and may be any.
        plain = start[257:262] == b"ustar"
        kinds = (opener for magic, opener in _COMPRESSED.items() if start.startswith(magic))
        opener = None if plain else next(kinds, None)
        if opener is None:
            yield PeekableStream(file, jumps=True)
        else:
            with opener(file) as stream:
                yield PeekableStream(stream, jumps=False)


def _gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _zstd(file: BinaryIO) -> Any:
    try:
        package: Any = importlib.import_module("zstandard")
    except ImportError:
        why = "compressed by zstd: pip install zstandard, or unpack it with zstd -d"
        raise DataError(why) from None
    return io.BufferedReader(_Zstd(package, file))


class _Zstd(io.RawIOBase):
    """zstandard's reader with an error that is known."""

    def __init__(self, package: Any, file: BinaryIO) -> None:
        self._error = package.ZstdError
        self._reader = package.ZstdDecompressor().stream_reader(file, read_across_frames=True)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """As many bytes as there are."""
        try:
            return int(self._reader.readinto(buffer))
        except self._error as error:
            raise OSError(str(error)) from error


_COMPRESSED: Final[dict[bytes, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}
