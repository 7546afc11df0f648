"""Files: atomic writes, checks of output paths, locks, and the path of the cache folder."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from serving.errors import OptionError


def check_file(path: Path, option: str = "--out") -> None:
    """Check that an output file can be written. Call this before the work that produces the file.

    Args:
        path: Path of the output file.
        option: The option that names the file, for error messages.

    Raises:
        OptionError: The path is a folder, or its parent folder is missing or not writable.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise OptionError(f"{option} {path}: a folder; name a file")
    if not folder.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}; make it first")
    _check_writable(folder, f"{option} {path}")


def check_folder(path: Path, option: str = "--out") -> None:
    """Check that files can be written to a folder, which may not exist yet.

    Args:
        path: The folder.
        option: The option that names the folder, for error messages; "" if there is none.

    Raises:
        OptionError: The folder, or the nearest parent folder that exists, is not writable.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    _check_writable(existing, f"{option} {path}".lstrip())


def _check_writable(folder: Path, named: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OptionError(f"{named}: {folder} can't be written to; choose another")


def user_cache_folder() -> Path:
    """Return the folder for data that can be recomputed: `$XDG_CACHE_HOME/fledge`.

    Without XDG_CACHE_HOME, the folder is `~/.cache/fledge`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fledge"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename the file to `path` at the end.

    Before the rename, the file is flushed to disk. On an error the temporary file is removed, and
    an older file at `path` stays. A killed process leaves the temporary file `.NAME.partial`, which
    the next write of `path` replaces.

    Raises:
        OSError: The file can't be written. The error names `path`, not the temporary file. So does
            an error of the block that names no file, because a failed write names none.
    """
    partial = _partial(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the first error is told, not the one of the removal
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        if error.filename is not None and os.fspath(error.filename) != str(partial):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it to `path` at the end.

    An older folder at `path` is replaced. The caller must flush the files in the folder to disk. On
    an error the temporary folder is removed, and an older folder at `path` stays. A killed process
    leaves the folders `.NAME.partial` or `.NAME.older`; the next call for `path` removes them.
    Where the system can't exchange folders (see `exchange`), nothing is at `path` for a moment.

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
            if exchange(partial, path):
                return  # the older folder is at `partial` now
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


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or folders in one step: at any moment both paths exist.

    Returns:
        Whether they were exchanged; False if the operating system or the file system can't.

    Raises:
        OSError: The exchange failed for another reason.
    """
    names = os.fsencode(one), os.fsencode(other)
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        function, arguments = "renamex_np", (*names, _EXCHANGE)
    else:
        function, arguments = "renameat2", (_HERE, names[0], _HERE, names[1], _EXCHANGE)
    if not hasattr(library, function):
        return False
    if getattr(library, function)(*arguments) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, *_UNSUPPORTED):
        return False
    raise OSError(error, os.strerror(error), str(other))


_EXCHANGE: Final = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_HERE: Final = -100  # AT_FDCWD: relative paths begin in the current folder


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def files_below(folder: Path) -> list[Path]:
    """Return the paths of all files in a folder and its subfolders, sorted.

    Raises:
        OSError: A folder can't be read. `Path.rglob` would leave out its files without a word.
    """

    def fail(error: OSError) -> None:
        raise error

    walked = os.walk(folder, onerror=fail)
    paths = (Path(parent) / name for parent, _, names in walked for name in names)
    return sorted(path for path in paths if path.is_file())


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock(file: int, *, wait: bool) -> None:
    """Take an exclusive lock on an open file or folder. Closing the file releases the lock.

    Args:
        file: File descriptor.
        wait: Whether to wait until the lock is free.

    Raises:
        BlockingIOError, PermissionError: Another process holds the lock, and `wait` is False.
        NoLocks: The operating system or the file system does not support locks.
        OSError: The lock failed for another reason.
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
    """The operating system or the file system does not support file locks."""
