"""Atomic writes, checks of output paths, file locks and the cache folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from serving.errors import OptionError


def check_file(path: Path, option: str = "--out") -> None:
    """Check that a result file can be written, before the work that produces it.

    Raises:
        OptionError: The file can't be written; the message names `option`.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise OptionError(f"{option} {path}: a folder; name a file")
    if not folder.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}; make it first")
    _check_writable(folder, f"{option} {path}")


def check_folder(path: Path, option: str = "--out") -> None:
    """Check that files can be written in a folder that exists or will be created.

    Args:
        path: The folder.
        option: "" if no option names the folder.

    Raises:
        OptionError: Files can't be written there; the message names `option`.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    _check_writable(existing, f"{option} {path}".lstrip())


def _check_writable(folder: Path, named: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OptionError(f"{named}: {folder} can't be written to; choose another")


def user_cache_folder() -> Path:
    """Folder for data that can be computed or downloaded again: `$XDG_CACHE_HOME/fledge`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fledge"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; at the end flush it to disk, rename it to `path`.

    On an error the temporary file is removed and an older `path` stays. A killed process leaves
    `.NAME.partial` behind, which the next write of `path` replaces.

    Raises:
        OSError: The file can't be written; the error's file name is `path`.
    """
    partial = _partial(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) != str(partial):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder; at the end rename it to `path`, replacing an older folder.

    The files in it must be flushed to disk by their writer. On an error the temporary folder is
    removed and an older `path` stays. A killed process leaves `.NAME.partial` or `.NAME.older`
    behind, which the next call for `path` removes.

    Raises:
        OSError: The folder can't be created or renamed.
    """
    partial, older = _partial(path), path.with_name(f".{path.name}.older")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(older, ignore_errors=True)
        sync(partial)
        if path.exists():
            path.rename(older)
        try:
            partial.rename(path)
        except OSError:
            if older.exists():
                older.rename(path)
            raise
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock(file: int, *, wait: bool) -> None:
    """Take an exclusive lock on an open file or folder; closing the file releases it.

    Args:
        file: File descriptor.
        wait: Whether to wait until the lock is free.

    Raises:
        BlockingIOError, PermissionError: Another process holds the lock, and `wait` is false.
        NoLocks: This system or file system does not support locks.
        OSError: Another error.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NoLocks("this system has no file locks") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise NoLocks(error.errno, error.strerror) from error
        raise


class NoLocks(OSError):
    """File locks are not supported on this system or file system."""
