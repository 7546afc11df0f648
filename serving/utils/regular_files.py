"""Read files that may come from others: only regular files, and only up to a size limit.

Opening a FIFO or a device can block for ever, and reading one can have no end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, AnyStr, Final

# Without O_NONBLOCK, `open` of a FIFO waits for a writer. It has no effect on regular files.
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


MAX_LINE: Final = 2**24
"""Largest line of a table in JSON lines, in characters or bytes."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: The file can't be opened, or it is a FIFO, device, socket or folder.
    """
    _check(path, os.stat(path))  # first without opening: opening a device can have effects
    file = os.fdopen(os.open(path, _FLAGS), "rb")
    try:
        _check(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def read_limited(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        OSError: The file can't be read, is no regular file, is larger, or grows meanwhile.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        data = file.read(size + 1)
        if len(data) > size:
            raise OSError(errno.EIO, "changed while it was read", str(path))
        return data


def limited_lines(file: IO[AnyStr], most: int = MAX_LINE) -> Iterator[AnyStr]:
    """Yield the lines of an open file.

    Raises:
        OSError: A line has more than `most` characters or bytes.
    """
    number = 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise OSError(errno.EFBIG, f"line {number} is longer than {most:,} bytes")
        yield line


def _check(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
