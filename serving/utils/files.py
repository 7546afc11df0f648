"""Files: atomic writes, checks of output paths, locks, and the path of the cache folder."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from serving.errors import OptionError
from serving.utils.process import tell_cache_folder


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
    tell_cache_folder()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fledge"


def make_user_cache_folder() -> Path:
    """Create the folder for data that can be recomputed, for this user alone, and return it.

    Raises:
        OSError: The folder can't be created.
    """
    folder = user_cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename the file to `path` at the end.

    The temporary file `.NAME.RANDOM.partial` is created here, so it can't be a link or a file of
    someone else; the caller opens it again by its name. Before the rename, the file is flushed to
    disk. On an error the temporary file is removed, and an older file at `path` stays. A killed
    process leaves the temporary file, which a later process removes at its first write to the
    folder.

    Args:
        path: Path of the file. A link at this path is replaced, not followed.
        mode: Permissions of the file, from which the umask is taken off.

    Raises:
        OSError: The file can't be written. The error names `path`, not the temporary file. So does
            an error of the block that names no file, because a failed write names none.
    """
    partial = _partial(path)
    opened: int | None = None
    try:
        while opened is None:
            _remove_stale(path.parent)
            opened = _hold(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException as error:
        _discard(partial, partial.unlink)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        if error.filename is not None and os.fspath(error.filename) != str(partial):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if opened is not None:
            os.close(opened)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it to `path` at the end.

    An older folder at `path` is replaced. The caller must flush the files in the folder to disk. On
    an error the temporary folder is removed, and an older folder at `path` stays. A killed process
    leaves folders `.NAME.RANDOM.partial`, which are removed as those of `atomic_write`. Where the
    system can't exchange folders (see `exchange`), nothing is at `path` for a moment.

    Raises:
        OSError: The folder can't be created or renamed.
    """
    partial, older = _partial(path), _partial(path)
    opened: int | None = None
    try:
        while opened is None:
            _remove_stale(path.parent)
            partial.mkdir(0o777 | _MARK)
            opened = _hold(partial, os.O_RDONLY)
        yield partial
        sync(partial)
        if path.exists():
            _set_mark(path, True)
            if exchange(partial, path):  # the older folder is at `partial` now
                _set_mark(path, False)
                return
            path.rename(older)
        try:
            partial.rename(path)
        except OSError:
            if older.exists():
                older.rename(path)
                _set_mark(path, False)
            raise
        _set_mark(path, False)
        _discard(older, lambda: _remove_folder(older))
    finally:
        if opened is not None:
            os.close(opened)
        _discard(partial, lambda: _remove_folder(partial))


def _set_mark(folder: Path, value: bool) -> None:
    if not folder.is_symlink():
        mode = stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(mode | _MARK if value else mode & ~_MARK)


def partial_of(name: str) -> str:
    """Return NAME if `name` is that of a temporary file of `atomic_write` for NAME; else ""."""
    found = _PARTIAL.fullmatch(name)
    return found[1] if found else ""


def _partial(path: Path) -> Path:
    stem = path.name
    while len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = stem[:-1]
    return path.with_name(f".{stem}.{secrets.token_hex(8)}.partial")


_PARTIAL: Final = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial", re.DOTALL)
_LONGEST_STEM: Final = 100
"""Bytes of the longest stem in the name of a temporary file, so that any file system takes it."""

_swept: Final[set[str]] = set()
"""Folders in which this process has looked for temporary files of killed processes."""


def _hold(partial: Path, flags: int, mode: int = 0o666) -> int | None:
    """Open a new temporary file or folder, and lock it as a sign that it is in use.

    Returns:
        The descriptor. None if another process took the path for a leftover before it was locked,
        and removed it.
    """
    opened = os.open(partial, flags | _SAFELY, mode)
    with suppress(OSError):  # without support for locks, leftovers are never removed
        lock(opened, wait=True)
    try:
        if os.path.samestat(os.fstat(opened), os.lstat(partial)):
            return opened
    except FileNotFoundError:
        pass
    os.close(opened)
    return None


def _remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one: `path` was the older folder, which the user may link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _discard(path: Path, remove: Callable[[], object]) -> None:
    """Remove a temporary file or folder. If that fails, the next write to its folder tries again.

    The error is not raised, because another one is raised already.
    """
    try:
        remove()
    except FileNotFoundError:
        pass
    except OSError:
        _swept.discard(os.path.abspath(path.parent))


def _remove_stale(folder: Path) -> None:
    """Remove temporary files and folders that killed processes of this user left in a folder.

    A process searches a folder once. Files are recognised by their name and by the lock, which a
    running process holds.
    """
    key = os.path.abspath(folder)
    if key in _swept:
        return
    _swept.add(key)
    with suppress(OSError):
        for name in os.listdir(folder):
            if _PARTIAL.fullmatch(name):
                with suppress(OSError):  # in use, a link, or not ours: it stays
                    _remove_unlocked(folder / name)


def _remove_unlocked(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _SAFELY)
    try:
        status = os.fstat(opened)
        if status.st_uid != os.geteuid():
            return
        lock(opened, wait=False)
        if stat.S_ISREG(status.st_mode):
            path.unlink()
        # Without the mark of `atomic_folder`, someone else gave the folder this name.
        elif stat.S_ISDIR(status.st_mode) and status.st_mode & _MARK:
            shutil.rmtree(path)
    finally:
        os.close(opened)


_MARK: Final = stat.S_ISVTX
"""Mode bit of each folder that may be removed as left over. Nobody but its owner can set it."""
_SAFELY: Final = os.O_NOFOLLOW | os.O_CLOEXEC


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


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """Yield a path by which libraries open a file whose own path they refuse: not UTF-8.

    Args:
        path: An existing file.

    Raises:
        OSError: The file can't be opened.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        opened = os.open(path, os.O_RDONLY)
        try:
            yield f"/dev/fd/{opened}"
        finally:
            os.close(opened)
    else:
        yield str(path)


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock(file: int, *, wait: bool, shared: bool = False) -> None:
    """Take a lock on an open file or folder. Closing the file releases the lock.

    Args:
        file: File descriptor.
        wait: Whether to wait until the lock is free.
        shared: Whether other processes may hold a shared lock at the same time.

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
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise NoLocks(error.errno, error.strerror) from error
        raise


class NoLocks(OSError):
    """The operating system or the file system does not support file locks."""
