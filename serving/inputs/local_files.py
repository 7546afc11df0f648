"""Read local files whose names come from lists: regular files of limited size, within a folder."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, Final

from serving.errors import BrokenImage, TooLarge
from serving.inputs.compression import FIXED, MAX_FILE

_PIECE: Final = 2**20
_PERMISSIONS: Final = 0o777


def read_file(path: str, root: str | None = None) -> tuple[bytes, int]:
    """Return the bytes and the permissions of a regular file.

    Args:
        path: The file. Links are followed.
        root: Real path of a folder that must contain the file to which `path` leads. None: any.

    Raises:
        BrokenImage: The file can't be read, is no regular file, or lies outside of `root`.
        TooLarge: The file has more than `MAX_FILE` bytes.
    """
    try:
        # Some devices do something when they are opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BrokenImage("not a file")
        # Without O_NONBLOCK, opening a named pipe that has replaced the file would wait for ever.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(opened, "rb") as file:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise BrokenImage("not a file")
            if root is not None and not os.path.samestat(status, os.stat(_inside(path, root))):
                raise BrokenImage("it was replaced while it was opened")
            if status.st_size > MAX_FILE:
                raise TooLarge(f"{status.st_size} bytes are more than the {MAX_FILE} {FIXED}")
            data = file.read(status.st_size + 1)
            if len(data) > status.st_size:  # it grows, or is a file of /proc
                data += _rest(file, len(data))
            return data, status.st_mode & _PERMISSIONS
    except OSError as error:
        raise BrokenImage(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise BrokenImage(f"not a path: {error}") from error


def check_inside(path: str, root: str | None) -> None:
    """Check that a path leads into a folder.

    Args:
        path: The path. Links are followed.
        root: Real path of the folder. None: any path is accepted.

    Raises:
        BrokenImage: `path` leads out of `root`.
    """
    if root is not None:
        _inside(path, root)


def _inside(path: str, root: str) -> str:
    real = os.path.realpath(path)
    if os.path.commonpath([real, root]) != root:
        raise BrokenImage(f"it lies outside of --root {root}")
    return real


def _rest(file: BinaryIO, size: int) -> bytes:
    """Return the bytes up to the end of a file that has more than it stated; `size` were read."""
    pieces = []
    while piece := file.read(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_FILE:
            raise TooLarge(f"more than the {MAX_FILE} bytes {FIXED}")
    return b"".join(pieces)
