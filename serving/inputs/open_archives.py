"""Load members of archives by name. Each archive is opened once per process, for all threads.

A zip and an uncompressed tar allow random access. The headers up to the requested member are read
once; after that, loading a member reads only the header and the bytes of that member.

A compressed tar can only be read sequentially. If the members are requested in the order of the
archive, one pass is enough. A request for an earlier member restarts decompression from the
beginning. Parallel threads request members slightly out of order. Therefore members read before the
requested one are kept in a cache of limited size.
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, Final, Protocol

from serving.errors import BrokenImage, DataError, ImageError
from serving.inputs import archives, tar, zip_archive
from serving.inputs.archive_members import Member

_CACHE_BYTES: Final = 2**28
"""Largest size of `_MemberCache`, in bytes."""

_MAX_NAMES: Final = 1_000_000
_MAX_OPEN: Final = 200
"""Largest numbers of member names in memory and of open archives. The two most recently used
archives stay open in any case."""

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size and modification time. A path alone may refer to another file later."""


class Archive(Protocol):
    """An open archive.

    Attributes:
        names: Maps the name of each member found so far to the position of the member.
    """

    names: dict[str, int]

    def load(self, member: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            ImageError: The member can't be read or is too large.
        """


class OpenArchives:
    """Open archives of a process. Thread-safe.

    If too many archives are open, the least recently used one is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[FileIdentity, Archive] = OrderedDict()
        self._cache = _MemberCache()

    def load(self, path: str, member: str) -> bytes:
        """Return the bytes of one member of an archive.

        Args:
            path: The archive.
            member: Name of the member.

        Raises:
            ImageError: The archive or the member can't be read, or the member is too large.
        """
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            with self._lock:
                archive = self._open.get(identity) or self._add(path, identity)
                self._open.move_to_end(identity)
        except OSError as error:
            raise BrokenImage(f"can't be read: {error.strerror or error}") from error
        except DataError as error:
            raise BrokenImage(f"the archive is {error}") from error
        return archive.load(member)

    def _add(self, path: str, identity: FileIdentity) -> Archive:
        archive = _open_archive(path, self._cache)
        self._open[identity] = archive
        names = sum(len(one.names) for one in self._open.values())
        while len(self._open) > 2 and (names > _MAX_NAMES or len(self._open) > _MAX_OPEN):
            names -= len(self._open.popitem(last=False)[1].names)
        return archive


def _open_archive(path: str, cache: _MemberCache) -> Archive:
    if zip_archive.is_zip(path):
        before = zip_archive.bytes_before(path)
        return _PlainArchive(path, partial(zip_archive.read_member_at, before=before))
    if tar.is_compressed(path):
        return _CompressedArchive(path, cache)
    return _PlainArchive(path, tar.read_member_at)


_SHARED: weakref.WeakValueDictionary[int, OpenArchives] = weakref.WeakValueDictionary()
_LOCK: Final = threading.Lock()


def process_archives() -> OpenArchives:
    """Return the `OpenArchives` of this process, one object for all callers.

    The archives are closed when the last reference to this object is deleted.
    """
    with _LOCK:
        # One object per process id, because a forked process shares file positions with its parent.
        found = _SHARED.get(os.getpid())
        if found is None:
            found = _SHARED[os.getpid()] = OpenArchives()
        return found


class _MemberIterator:
    """Iterator over the members of an archive, in order."""

    def __init__(self, path: str) -> None:
        self._members = archives.images(path)
        self._end = "no image of that name in the archive"

    def next(self) -> Member:
        """Return the next member.

        Raises:
            BrokenImage: There are no more members, or the rest of the archive can't be read.
                Further calls raise the same error.
        """
        try:
            for member in self._members:
                return member
        except OSError as error:
            self._end = f"can't be read: {error.strerror or error}"
        except DataError as error:
            self._end = f"the archive is {error}"
        raise BrokenImage(self._end)


class _PlainArchive:
    """`Archive` with random access. `names` maps each member's name to `Member.offset`."""

    def __init__(self, path: str, read_at: Callable[[BinaryIO, int], bytes]) -> None:
        self._read_at = read_at
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)  # after the last thread has used it
        self._lock = threading.Lock()
        self._members = _MemberIterator(path)
        self.names: dict[str, int] = {}

    def load(self, member: str) -> bytes:
        with self._lock:
            while member not in self.names:
                found = self._members.next()
                self.names[found.name] = found.offset
            offset = self.names[member]
        return self._read_at(io.BufferedReader(_PositionedFile(self._file)), offset)


class _CompressedArchive:
    """Compressed `Archive`.

    `names` maps each member's name to its position in the archive, counted from 0.
    """

    def __init__(self, path: str, cache: _MemberCache) -> None:
        self._path, self._cache, self._key = path, cache, object()
        self._lock = threading.Lock()
        self._members, self._passed = _MemberIterator(path), 0
        self.names: dict[str, int] = {}

    def load(self, member: str) -> bytes:
        with self._lock:
            found = self._cache.pop((self._key, member))
            if found is None:
                found = self._read_to(member)
        if isinstance(found, ImageError):
            raise found
        return found

    def _read_to(self, member: str) -> bytes | ImageError:
        """Read the archive sequentially up to `member`, and cache the members before it.

        Reading starts at the beginning of the archive again if `member` was read already.
        """
        if self.names.get(member, self._passed) < self._passed:
            self._members, self._passed = _MemberIterator(self._path), 0
        while True:
            current = self._members.next()
            self.names.setdefault(current.name, self._passed)
            self._passed += 1
            found = _read(current)
            if current.name == member:
                return found
            self._cache.put((self._key, current.name), found)


class _MemberCache:
    """Thread-safe cache of members that were read but not yet requested.

    The keys are pairs of archive and member name. When the cache is full, the oldest member is
    evicted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: OrderedDict[tuple[object, str], bytes | ImageError] = OrderedDict()
        self._bytes = 0

    def put(self, key: tuple[object, str], found: bytes | ImageError) -> None:
        self.pop(key)
        with self._lock:
            self._members[key] = found
            self._bytes += _size(found)
            while self._bytes > _CACHE_BYTES:
                self._bytes -= _size(self._members.popitem(last=False)[1])

    def pop(self, key: tuple[object, str]) -> bytes | ImageError | None:
        """Remove a member from the cache and return it; None if it is not cached."""
        with self._lock:
            found = self._members.pop(key, None)
            if found is not None:
                self._bytes -= _size(found)
            return found


class _PositionedFile(io.RawIOBase):
    """View of an open file with a position of its own.

    Several threads can therefore read through the same file descriptor.
    """

    def __init__(self, file: int) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, to: int, whence: int = 0, /) -> int:
        self._position = self._position + to if whence == os.SEEK_CUR else to
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = os.pread(self._file, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _size(found: bytes | ImageError) -> int:
    """Return the number of bytes that a cached item takes; for an error, a rough estimate."""
    return len(found) if isinstance(found, bytes) else 1000


def _read(member: Member) -> bytes | ImageError:
    try:
        return member.read()
    except ImageError as error:
        return error
