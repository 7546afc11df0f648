"""A file of decoded photos that outlives runs, whatever kills them.

    index            header, then a record for every row: whose pixels it holds
    rows-NUMBER.bin  uint8 [rows, S, S, 3]; the header names which file

A row is listed when it is safely on the disk, and never changes afterwards; so readers need no
lock. Rows behind the last one listed are free. A pack that is begun anew has another file of rows:
who reads the old one goes on, and no index is ever read with the rows of another.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from serving.imaging.preprocess import Pixels
from serving.utils.files import write_aside

FORMAT: Final = 1
FLUSH_BYTES: Final = 32 * 2**20
"""Rows of so many bytes are brought to the disk before they are listed together."""

_MAGIC: Final = b"fledge pixels %d\n" % FORMAT
_HEADER: Final = re.compile(re.escape(_MAGIC) + rb"([0-9a-f]{16})\n")
_HEADER_BYTES: Final = len(_MAGIC) + 17
_RECORD: Final = np.dtype([("digest", "V16"), ("aspect", "<f4"), ("check", "<u4")])
_PRIMES: Final = np.array([3, 5, 7, 11, 13], np.uint32)


@dataclass(frozen=True)
class StoreIndex:
    """What a pack holds.

    pixels: uint8 [rows, S, S, 3], a view of the file. rows: a photo's digest -> its row. aspect:
    float32 [rows], width over height. path: of the file; None where there is none. size: of the
    file in bytes, with what is free at its end.
    """

    pixels: Pixels = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    rows: dict[bytes, int] = field(default_factory=dict)
    aspect: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    path: Path | None = None
    size: int = 0


@dataclass
class PixelWriter:
    """Adds rows behind those that are there.

    file: open to write. index: takes the records; None where nobody else will read them. row_bytes:
    of a row. rows, aspect: as `StoreIndex`, and grow.
    """

    file: BinaryIO
    index: BinaryIO | None
    row_bytes: int
    rows: dict[bytes, int]
    aspect: list[float]
    _listed: int = 0

    def __post_init__(self) -> None:
        """Those that are there are listed already."""
        self._listed = len(self.aspect)
        self._digests = list(self.rows)
        self.file.seek(self._listed * self.row_bytes)

    def add(self, digest: bytes, pixels: Pixels, aspect: float) -> None:
        """One more row; nothing where the same photo has one."""
        if digest in self.rows:
            return
        self.file.write(np.ascontiguousarray(pixels).data)
        self.rows[digest] = len(self.aspect)
        self.aspect.append(aspect)
        self._digests.append(digest)
        if (len(self.aspect) - self._listed) * self.row_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """List what was added, once it is on the disk."""
        self.file.flush()
        if self.index is None:
            return
        os.fsync(self.file.fileno())
        records = np.empty(len(self.aspect) - self._listed, _RECORD)
        records["digest"] = np.array(self._digests[self._listed :], "V16")
        records["aspect"] = self.aspect[self._listed :]
        records["check"] = _checks(records)
        self.index.write(records.tobytes())
        self.index.flush()
        self._listed = len(self.aspect)

    def close(self) -> None:
        """Give back the room that was reserved and not used, and rows that were not listed."""
        with self.file, self.index or nullcontext():
            self.file.flush()
            self.file.truncate(self._listed * self.row_bytes)


@dataclass(frozen=True)
class PixelStore:
    """The rows of one way of making pixels. folder: an entry of the cache; side: S, in pixels."""

    folder: Path
    side: int

    @property
    def row_bytes(self) -> int:
        """Of one photo."""
        return 3 * self.side**2

    def read(self) -> StoreIndex:
        """What is there now; nothing where anything is damaged.

        Raises:
            OSError: It is there and can't be read.
        """
        try:
            data = (self.folder / "index").read_bytes()
            header = _HEADER.match(data)
            if not header:
                return StoreIndex()
            path = self.folder / f"rows-{header[1].decode()}.bin"
            # A writer that was killed may have left a part of a record at the end.
            count = (len(data) - _HEADER_BYTES) // _RECORD.itemsize
            records = np.frombuffer(data, _RECORD, count, _HEADER_BYTES)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < count * self.row_bytes or (_checks(records) != records["check"]).any():
                    return StoreIndex()
                pixels = in_file(file, count, self.side)
        except FileNotFoundError:
            return StoreIndex()
        digests = (digest.tobytes() for digest in records["digest"])
        rows = {digest: row for row, digest in enumerate(digests)}
        return StoreIndex(pixels, rows, records["aspect"].astype(np.float32), path, size)

    def room_needed(self, listed: StoreIndex, more: int) -> int:
        """Bytes by which the file grows when `more` rows are added."""
        return max(0, (len(listed.rows) + more) * self.row_bytes - listed.size)

    def begin_anew(self) -> None:
        """Without rows; only for who holds the entry."""
        number = secrets.token_hex(8)
        path = self.folder / f"rows-{number}.bin"
        path.touch()
        with write_aside(self.folder / "index") as aside:
            aside.write_bytes(_MAGIC + number.encode() + b"\n")
        for old in self.folder.glob("rows-*.bin"):
            if old != path:
                old.unlink()

    def writer(self, listed: StoreIndex, more: int) -> PixelWriter:
        """Go on behind `listed`, as read by who holds the entry, with room for `more` rows.

        Raises:
            OSError: The disk is full, or can't be written.
        """
        if listed.path is None:
            self.begin_anew()
            listed = self.read()
        assert listed.path is not None  # just made
        end = len(listed.rows) * self.row_bytes
        index = (self.folder / "index").open("r+b")
        index.truncate(_HEADER_BYTES + len(listed.rows) * _RECORD.itemsize)
        index.seek(0, os.SEEK_END)
        file = listed.path.open("r+b")
        writer = PixelWriter(file, index, self.row_bytes, dict(listed.rows), listed.aspect.tolist())
        try:
            reserve(file, end + more * self.row_bytes, self.folder)
        except OSError:
            writer.close()
            raise
        return writer


def in_file(file: BinaryIO, count: int, side: int) -> Pixels:
    """Its first `count` rows, uint8 [count, side, side, 3], read as they are asked for."""
    shape = (count, side, side, 3)
    if not count:  # what is empty can't be mapped
        return np.empty(shape, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r", shape=shape))


def reserve(file: BinaryIO, size: int, folder: Path) -> None:
    """Take room for `size` bytes now, so that a full disk is known before the work.

    Raises:
        OSError: There is too little. folder: where the file is.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
        return
    have = os.fstat(file.fileno()).st_size
    if shutil.disk_usage(folder).free < size - have:
        raise OSError("too little room")
    file.truncate(max(size, have))


def _checks(records: npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
    """A sum for each record that a torn or empty one does not have."""
    words = np.frombuffer(records.tobytes(), "<u4").reshape(len(records), len(_PRIMES) + 1)
    sums = (words[:, :-1] * _PRIMES).sum(axis=1, dtype=np.uint32) ^ np.uint32(0x5EED)
    return np.asarray(sums)
