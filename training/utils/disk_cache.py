"""Disk cache of decoded pixels, activations and extracted archives, with a size limit.

An entry of the cache is a folder `KIND-KEY`, where KIND is `pixels`, `activations` or `archive` and
KEY is a hash. Its file `entry.json` has a description of the entry. The modification time of
`entry.json` is the time of the entry's last use. A process must hold a lock on `entry.json` to
write to the entry, or a shared lock to keep it from being removed. The files of an archive are in
the folder `files` of its entry; their size is in `index`. Other files and folders in the cache
folder are never changed or removed.

Folders and files are for this user alone. A cache folder that other users can write to, or that
belongs to another user, is not used: whoever writes to it decides what a network is trained on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from serving.errors import OptionError
from serving.terminal import quote_path
from serving.utils import json_reader
from serving.utils.files import lock, user_cache_folder
from serving.utils.parallel import map_ordered
from serving.utils.regular_files import read_limited

GB: Final = 1e9
DEFAULT_GB: Final = 10.0
ENTRY_FILE: Final = "entry.json"
INDEX, FILES, ARCHIVE = "index", "files", "archive-"
_MAX_ENTRY: Final = 2**16  # bytes of an entry file

_PIECE: Final = 2**23  # bytes

_NAME: Final = re.compile(r"(pixels|activations|archive)-[0-9a-f]{32}")
_OWN_FOLDERS: Final = re.compile(r"files|\.files\.[0-9a-f]{16}\.partial")
_OWN_FILES: Final = re.compile(r"index|\.index\.[0-9a-f]{16}\.partial|[a-z]+-[0-9a-f]{16}\.bin")


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the cache.

    Attributes:
        path: Folder of the entry.
        description: Content of the entry, as text for `fledge cache`.
        size: Size of the entry's files in bytes.
        used: Time of last use, in seconds since 1970.
    """

    path: Path
    description: str
    size: int
    used: float


@dataclass(frozen=True)
class DiskCache:
    """The disk cache.

    Attributes:
        folder: Folder that contains the entries.
        budget: Size limit of all entries together, in bytes.
    """

    folder: Path
    budget: int

    def entries(self) -> list[CacheEntry]:
        """Return all entries; the least recently used entry is first."""
        try:
            found = [_read_entry(Path(item.path)) for item in os.scandir(self.folder)]
        except OSError:
            found = []
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used)

    def size(self) -> int:
        """Return the total size of the entries, in bytes."""
        return sum(entry.size for entry in self.entries())

    def available(self, keep: Set[str]) -> int:
        """Return the number of free bytes after removing all entries that are not in `keep`.

        No entry is removed by this method.

        Args:
            keep: Folder names of entries.
        """
        kept = sum(entry.size for entry in self.entries() if entry.path.name in keep)
        return max(0, self.budget - kept)

    def evict(self, size: int, keep: Set[str]) -> bool:
        """Remove the least recently used entries until `size` more bytes fit into the size limit.

        Entries that another process is writing are not removed. Processes that have opened the
        files of a removed entry can still read these files.

        Args:
            size: Number of bytes that will be added to the cache.
            keep: Folder names of entries that must not be removed.

        Returns:
            Whether `size` bytes fit into the size limit now.
        """
        self._remove_empty_folders()
        entries = self.entries()
        total = sum(entry.size for entry in entries) + size
        for entry in entries:
            if total <= self.budget:
                break
            if entry.path.name not in keep and remove(entry.path):
                total -= entry.size
        return total <= self.budget

    def clear(self) -> tuple[int, list[CacheEntry]]:
        """Remove all entries, except those that can't be removed.

        Returns:
            The number of bytes freed, and the entries that could not be removed.
        """
        self._remove_empty_folders()
        entries = self.entries()
        busy = [entry for entry in entries if not remove(entry.path)]
        return sum(entry.size for entry in entries if entry not in busy), busy

    def _remove_empty_folders(self) -> None:
        """Remove the folders of entries whose removal was killed after the last file."""
        with suppress(OSError):
            for item in os.scandir(self.folder):
                if _NAME.fullmatch(item.name):
                    with suppress(OSError):  # it is not empty
                        os.rmdir(item.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Return a context in which this process holds the lock of the whole cache.

        Hold the lock from the check of the size limit until the space is used. It prevents two
        processes from using the same free space.
        """
        file = os.open(self.folder, os.O_RDONLY)
        try:
            # On file systems without locks on folders, concurrent runs may exceed the budget.
            with suppress(OSError):
                lock(file, wait=True)
            yield
        finally:
            os.close(file)


def cache_folder() -> Path:
    """Return the cache folder: the environment variable `FLEDGE_CACHE`, else the user's default."""
    setting = os.environ.get("FLEDGE_CACHE", "").strip()
    return Path(os.path.expanduser(setting)).absolute() if setting else user_cache_folder()


def budget_gb(gb: float | None = None) -> float:
    """Return the size limit of the cache in gigabytes.

    Args:
        gb: Value of `--cache-gb`. None: the environment variable `FLEDGE_CACHE_GB`, else 10.

    Raises:
        OptionError: The size limit is negative or not a finite number; the message names the option
            or the environment variable.
    """
    setting = os.environ.get("FLEDGE_CACHE_GB", "").strip()
    name, text = "--cache-gb", str(gb)
    if gb is None:
        name, text = "FLEDGE_CACHE_GB =", setting or str(DEFAULT_GB)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(f"{name} {text}: use gigabytes, 0 or more")
    return value


def open_cache(gb: float | None = None) -> DiskCache:
    """Open the cache, with the size limit that `budget_gb` returns.

    The limit is lowered if necessary to half of the disk space that would be free without the
    cache.

    Args:
        gb: Value of `--cache-gb`; None: not given.

    Raises:
        OptionError: The size limit is negative or not a finite number.
    """
    cache = DiskCache(cache_folder(), int(budget_gb(gb) * GB))
    existing = next((path for path in (cache.folder, *cache.folder.parents) if path.exists()), None)
    try:
        free = shutil.disk_usage(existing or Path.cwd()).free
    except OSError:
        return cache
    return DiskCache(cache.folder, min(cache.budget, (free + cache.size()) // 2))


@contextmanager
def locked_entry(path: Path, description: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Return a context in which this process holds the write lock of an entry.

    The entry is created if it does not exist.

    Args:
        path: Folder of the entry.
        description: Content of the entry, as text for `fledge cache`.
        on_wait: Function that is called before waiting, if another process holds the lock.

    Raises:
        OSError: The entry can't be written or can't be locked, or others can write to it.
    """
    file: BinaryIO | None = None
    while file is None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        check_private(path)
        try:
            file = _open_locked(path, "a+b", wait=False)
        except BlockingIOError:
            on_wait()
            file = _open_locked(path, "a+b", wait=True)
    with file:
        content = json.dumps({"fledge-cache": 1, "what": description}).encode() + b"\n"
        file.seek(0)
        if file.read() != content:
            file.truncate(0)
            file.write(content)
            file.flush()
        yield


def check_private(path: Path) -> None:
    """Check that only this user can write to an entry and to the cache folder, if they exist.

    Args:
        path: Folder of the entry.

    Raises:
        PermissionError: The folder of the entry is a link, or one of the folders belongs to another
            user or can be written to by others.
    """
    for folder, status_of in ((path.parent, os.stat), (path, os.lstat)):
        try:
            status = status_of(folder)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode):
            raise PermissionError(errno.EPERM, "it is no folder, or a link", str(folder))
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            chmod = f"chmod go-w {quote_path(folder)}"
            reason = f"others can write to it; use `{chmod}`, or FLEDGE_CACHE for another folder"
            raise PermissionError(errno.EPERM, reason, str(folder))


def private(path: str, flags: int) -> int:
    """Open a file of the cache, for this user alone; a link is an error. An `opener` for `open`."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def checksum(data: memoryview) -> int:
    """Return the CRC-32 of the CRC-32s of all pieces of `data`; several threads compute it."""
    pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
    sums = map_ordered(zlib.crc32, pieces)
    return zlib.crc32(b"".join(value.to_bytes(4, "little") for value in sums))


def hold_entry(path: Path) -> BinaryIO | None:
    """Take a shared lock on an entry: until the returned file is closed, it is not removed.

    Returns:
        The locked file; None if the entry does not exist.

    Raises:
        OSError: The entry can't be read, or others can write to it.
    """
    check_private(path)
    return _open_locked(path, "rb", wait=True, shared=True)


def archive_size(path: Path) -> int | None:
    """Return the bytes of the files of an extracted archive; None if it is not complete."""
    try:
        values = json_reader.parse(read_limited(path / INDEX, _MAX_ENTRY))
        return max(0, int(values["bytes"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def mark_used(path: Path) -> None:
    """Set the time of last use of an entry to now."""
    with suppress(OSError):  # a cache without write permission
        os.utime(path / ENTRY_FILE)


def remove(path: Path) -> bool:
    """Remove an entry, unless another process is writing it.

    Returns:
        Whether the entry was removed.
    """
    try:
        file = _open_locked(path, "r+b", wait=False)
        if file is None:
            return True
        with file:
            # The index first, so that after a kill half-way the rest is a valid, empty entry.
            names = sorted(os.listdir(path), key=lambda name: name != INDEX)
            for name in filter(_OWN_FILES.fullmatch, names):
                (path / name).unlink(missing_ok=True)
            for name in filter(_OWN_FOLDERS.fullmatch, names):
                if path.name.startswith(ARCHIVE):
                    shutil.rmtree(path / name)
            (path / ENTRY_FILE).unlink(missing_ok=True)
    except OSError:
        return False
    with suppress(OSError):  # the folder contains files that are not the cache's
        path.rmdir()
    return True


def format_size(size: float) -> str:
    """Return a number of bytes as text in gigabytes ("0.3 GB"), or below 0.1 GB in megabytes."""
    if 0 < size < 0.1 * GB:
        return f"{size / 1e6:.1f} MB"
    return f"{size / GB:.1f}".removesuffix(".0") + " GB"


def abbreviate_home(path: Path) -> str:
    """Return the path as text, with `~` in place of the user's home folder."""
    with suppress(RuntimeError, ValueError):
        return str(Path("~") / path.relative_to(Path.home()))
    return str(path)


def _read_entry(path: Path) -> CacheEntry | None:
    """Return the entry in the folder `path`; None if the folder is not an entry of the cache."""
    if not _NAME.fullmatch(path.name) or path.is_symlink():
        return None
    try:
        content = read_limited(path / ENTRY_FILE, _MAX_ENTRY)
        # The file is empty if the process that created the entry was killed before writing to it.
        values = json_reader.parse(content) if content else {"fledge-cache": 1}
        if not isinstance(values, dict) or "fledge-cache" not in values:
            return None
        used = (path / ENTRY_FILE).stat().st_mtime
        files = [item for item in os.scandir(path) if _OWN_FILES.fullmatch(item.name)]
        size = sum(item.stat(follow_symlinks=False).st_size for item in files)
        if path.name.startswith(ARCHIVE):
            size += archive_size(path) or 0
    except (OSError, ValueError):
        return None
    return CacheEntry(path, str(values.get("what", "")), size, used)


def _open_locked(path: Path, mode: str, *, wait: bool, shared: bool = False) -> BinaryIO | None:
    """Open and lock the file `entry.json` of an entry.

    Args:
        path: Folder of the entry.
        mode: Mode for `open`.
        wait: Whether to wait if another process holds the lock.
        shared: Whether others may hold a shared lock, too.

    Returns:
        The locked file; None if the entry does not exist or was removed during the wait.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false.
    """
    try:
        file: BinaryIO = open(path / ENTRY_FILE, mode, opener=private)  # type: ignore[assignment] # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        lock(file.fileno(), wait=wait, shared=shared)
        # If the entry was removed during the wait, this is the lock of a deleted file.
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path / ENTRY_FILE)):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None
