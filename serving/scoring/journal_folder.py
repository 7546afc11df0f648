"""Folder of a scoring job's journal: created or recognised as ours, locked, and emptied.

The path of the folder can be guessed, so anything may lie there. A link, a folder of another user
and a folder without the mark of a journal are refused. Only files with the names of a journal's
files are ever deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, Final

from serving.errors import OptionError
from serving.utils.files import NoLocks, lock, partial_of

JOB: Final = "job.json"
LOCK: Final = "lock"

_MARK: Final = b"fledge scoring journal\n"
_OWN: Final = re.compile(
    r"job\.json|inputs\.json|inputs\.jsonl|skipped\.json|lock|[0-9]{5,}\.(jsonl|npy)"
)


class JournalFolder:
    """The locked journal folder of one job.

    Attributes:
        path: The folder.
    """

    def __init__(self, out: Path) -> None:
        """Create the folder or check the one that exists, and lock it.

        Args:
            out: Path of the table.

        Raises:
            OptionError: The path is a link or a file, or the folder belongs to another user or is
                no journal, or another process holds the lock.
            OSError: The folder can't be created or read.
        """
        self.path, self._out = folder_of(out), out
        self._lock = contextlib.ExitStack()
        self._check_or_create()
        try:
            self._acquire_lock()
        except BaseException:
            with contextlib.suppress(OSError):
                self.path.rmdir()  # fails if it is not empty
            raise

    def clear(self) -> None:
        """Delete the files of the journal, except for the lock.

        job.json is deleted first. Without it the other files are discarded at the next start, so a
        kill here is harmless.
        """
        (self.path / JOB).unlink(missing_ok=True)
        for name in os.listdir(self.path):
            if _is_own(name) and name != LOCK:
                (self.path / name).unlink()

    def release(self) -> None:
        """Release the lock. Delete the folder if it has no job and no other files."""
        with contextlib.suppress(OSError):
            if set(os.listdir(self.path)) <= {LOCK}:
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.close()

    def _check_or_create(self) -> None:
        try:
            self.path.mkdir(mode=0o700)
            return
        except FileExistsError:
            status = os.lstat(self.path)
        if not stat.S_ISDIR(status.st_mode):
            raise self._refused("a link" if stat.S_ISLNK(status.st_mode) else "no folder")
        if status.st_uid != os.geteuid():
            raise self._refused("a folder of another user")
        names = sorted(os.listdir(self.path))
        if names and not self._is_marked(all(map(_is_own, names))):
            raise self._refused(f"no journal of fledge score: it has {names[0]!r}")
        if status.st_mode & 0o077:  # made by an earlier version
            with contextlib.suppress(OSError):  # on a disk without permissions
                self.path.chmod(0o700)

    def _is_marked(self, only_own: bool) -> bool:
        """Check whether the folder, which is not empty, has the mark of a journal.

        Args:
            only_own: Whether all names in it are those of a journal's files. The mark may then be
                cut, because a killed process has written it, or empty, as of an earlier version.
        """
        try:
            opened = self._open_lock(os.O_RDONLY)
        except FileNotFoundError:
            return False
        with open(opened, "rb") as file:
            mark = file.read(len(_MARK) + 1)
        return mark == _MARK or (only_own and _MARK.startswith(mark))

    def _acquire_lock(self) -> None:
        """Lock the folder, and mark it as a journal.

        Without the lock, a second process could score the same job and delete the files.
        """
        with contextlib.ExitStack() as stack:  # closes the file, unless it gets locked
            file = self._open_lock(os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, file)
            try:
                lock(file, wait=False)
            except NoLocks:  # run without protection
                pass
            except (BlockingIOError, PermissionError) as error:
                raise OptionError(
                    f"--out {self._out}: another process is writing it; wait, or name another file"
                ) from error
            if os.fstat(file).st_size != len(_MARK):
                os.ftruncate(file, 0)
                os.write(file, _MARK)
            self._lock = stack.pop_all()

    def _open_lock(self, flags: int) -> int:
        path = self.path / LOCK
        try:
            kind = os.lstat(path).st_mode
        except FileNotFoundError:
            kind = stat.S_IFREG
        if not stat.S_ISREG(kind):
            raise self._refused(f"no journal of fledge score: {LOCK} in it is no file")
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)

    def _refused(self, what: str) -> OptionError:
        return OptionError(
            f"--out {self._out}: {self.path}, where the unfinished job would be kept, is {what}; "
            "remove it, or name another file"
        )


def folder_of(out: Path) -> Path:
    """Return the path of the journal folder for the table `out`."""
    return out.with_name(f".{out.name}.parts")


def open_file(path: Path) -> BinaryIO:
    """Open a file of the journal for reading.

    Raises:
        ValueError: It is no regular file; reading a named pipe might never end.
        OSError: It can't be opened, or is a link.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return os.fdopen(opened, "rb")
    os.close(opened)
    raise ValueError("it is no file")


def _is_own(name: str) -> bool:
    return bool(_OWN.fullmatch(partial_of(name) or name))
