"""Writing aside: a file or folder has its name when it is whole, and never before."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from serving.errors import OptionError


def check_file(path: Path, option: str = "--out") -> None:
    """Refuse a file that can't be written, before the work whose result it is to take.

    Raises:
        OptionError: Names the option.
    """
    home = path.absolute().parent
    if path.is_dir():
        raise OptionError(f"{option} {path}: a folder; name a file")
    if not home.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}; make it first")
    _check_home(home, f"{option} {path}")


def check_folder(path: Path, option: str = "--out") -> None:
    """As `check_file`, of a folder that is there or is to be made; "" where it has no option."""
    home = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    _check_home(home, f"{option} {path}".lstrip())


def _check_home(home: Path, named: str) -> None:
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise OptionError(f"{named}: {home} can't be written to; choose another")


def user_cache_folder() -> Path:
    """Folder for what can be computed or downloaded again: `$XDG_CACHE_HOME/fledge`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fledge"


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give a path to write a file to; flush it to the disk and rename it to `path` at the end.

    On any error it is removed, and an older `path` stays as it was. A kill leaves `.NAME.partial`,
    which the next write of `path` replaces.

    Raises:
        OSError: It can't be written; names `path`.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) != str(aside):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock(file: int, *, wait: bool) -> None:
    """Lock an open file or folder for this handle alone, until it is closed.

    Raises:
        BlockingIOError, PermissionError: Another one has it.
        NoLocks: This system or this disk has none.
        OSError: Another error.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NoLocks("this system has no file locks") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(error.errno, error.strerror) from error
        raise


class NoLocks(OSError):
    """Nobody can be kept out of a file here."""


def is_running(process: int) -> bool:
    """Whether a process of this number runs here."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
