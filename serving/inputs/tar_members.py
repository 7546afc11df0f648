"""Members of archives by name, each archive opened once for all threads of a process.

A plain tar is read anywhere: its headers are looked at once, as far as is asked for, and then
each member takes one header and its bytes. A compressed tar can only be read on: asked in order it
is unpacked once, and asked backwards it is begun anew. What was passed unasked is kept a while,
because threads that go on side by side ask a little out of order.
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import OrderedDict
from typing import Any, Final, Protocol

from serving.errors import BrokenImage, DataError, ImageError
from serving.inputs import tar

_KEPT: Final = 2**28
"""Bytes of members that were passed unasked."""

_NAMES: Final = 1_000_000
_OPEN: Final = 200
"""So many names and archives are held at most, but always those of the last two."""

Identity = tuple[int, int, int, int]
"""Of a file as it is now: a path may come to mean another."""


class Archive(Protocol):
    """An open archive. names: what is known of it."""

    names: dict[str, int]

    def load(self, member: str) -> bytes:
        """The bytes of a member, or ImageError."""


class Archives:
    """The archives that a process has open; safe among threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Identity, Archive] = OrderedDict()
        self._kept = _Kept()

    def load(self, path: str, member: str) -> bytes:
        """The bytes of a member.

        Raises:
            ImageError: It can't be read, or no photo is that big.
        """
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            with self._lock:
                archive = self._open.get(identity) or self._begin(path, identity)
                self._open.move_to_end(identity)
        except OSError as error:
            raise BrokenImage(f"can't be read: {error.strerror or error}") from error
        except DataError as error:
            raise BrokenImage(f"the archive is {error}") from error
        return archive.load(member)

    def _begin(self, path: str, identity: Identity) -> Archive:
        archive = _Stream(path, self._kept) if tar.is_stream(path) else _Plain(path)
        self._open[identity] = archive
        held = sum(len(one.names) for one in self._open.values())
        while len(self._open) > 2 and (held > _NAMES or len(self._open) > _OPEN):
            held -= len(self._open.popitem(last=False)[1].names)
        return archive


_SHARED: weakref.WeakValueDictionary[int, Archives] = weakref.WeakValueDictionary()
_LOCK: Final = threading.Lock()


def shared() -> Archives:
    """Those of this process; closed when nobody holds them any more."""
    with _LOCK:
        # By process: one that was forked must not move the files of the other.
        found = _SHARED.get(os.getpid())
        if found is None:
            found = _SHARED[os.getpid()] = Archives()
        return found


class _Walk:
    """The members of an archive one by one."""

    def __init__(self, path: str) -> None:
        self._members = tar.members(path)
        self._end = "no image of that name in the archive"

    def next(self) -> tar.TarMember:
        """The next on the way to one that has to come; BrokenImage where none does."""
        try:
            for member in self._members:
                return member
        except OSError as error:
            self._end = f"can't be read: {error.strerror or error}"
        except DataError as error:
            self._end = f"the archive is {error}"
        raise BrokenImage(self._end)


class _Plain:
    """A tar that is not compressed. names: member -> where its header is."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)  # once the last thread is through with it
        self._lock = threading.Lock()
        self._walk = _Walk(path)
        self.names: dict[str, int] = {}

    def load(self, member: str) -> bytes:
        """As `Archive`."""
        with self._lock:
            while member not in self.names:
                one = self._walk.next()
                self.names[one.name] = one.offset
            offset = self.names[member]
        return tar.read_at(io.BufferedReader(_View(self._file)), offset)


class _Stream:
    """A compressed tar. names: member -> how many come before it."""

    def __init__(self, path: str, kept: _Kept) -> None:
        self._path, self._kept, self._key = path, kept, object()
        self._lock = threading.Lock()
        self._walk, self._passed = _Walk(path), 0
        self.names: dict[str, int] = {}

    def load(self, member: str) -> bytes:
        """As `Archive`."""
        with self._lock:
            found = self._kept.take((self._key, member))
            if found is None:
                found = self._reach(member)
        if isinstance(found, ImageError):
            raise found
        return found

    def _reach(self, member: str) -> bytes | ImageError:
        if self.names.get(member, self._passed) < self._passed:
            self._walk, self._passed = _Walk(self._path), 0
        while True:
            one = self._walk.next()
            self.names.setdefault(one.name, self._passed)
            self._passed += 1
            found = _read(one)
            if one.name == member:
                return found
            self._kept.put((self._key, one.name), found)


class _Kept:
    """What was passed unasked: the latest, each until it is asked for. Keys: archive, member."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[object, str], bytes | ImageError] = OrderedDict()
        self._bytes = 0

    def put(self, key: tuple[object, str], found: bytes | ImageError) -> None:
        """Keep it, and let the oldest go."""
        self.take(key)
        with self._lock:
            self._found[key] = found
            self._bytes += _size(found)
            while self._bytes > _KEPT:
                self._bytes -= _size(self._found.popitem(last=False)[1])

    def take(self, key: tuple[object, str]) -> bytes | ImageError | None:
        """Give it away, if it is there."""
        with self._lock:
            found = self._found.pop(key, None)
            if found is not None:
                self._bytes -= _size(found)
            return found


class _View(io.RawIOBase):
    """An open file with a position of its own, so that threads are not in each other's way."""

    def __init__(self, file: int) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, to: int, whence: int = 0, /) -> int:
        """To a place from the start."""
        self._at = self._at + to if whence == os.SEEK_CUR else to
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """As many bytes as there are."""
        data = os.pread(self._file, len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _size(found: bytes | ImageError) -> int:
    return len(found) if isinstance(found, bytes) else 1000


def _read(member: tar.TarMember) -> bytes | ImageError:
    try:
        return member.read()
    except ImageError as error:
        return error
