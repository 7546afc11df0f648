"""Store of decoded photos on disk. It stays valid if a process is killed at any moment.

A row is the uint8 pixels of one photo, [S, S, 3]. The store is a folder with two files:

    index            header, then one record per row: hash of the photo, aspect ratio, checksum of
                     the row, checksum of the record
    rows-NUMBER.bin  the rows, uint8 [rows, S, S, 3]; the header of the index contains NUMBER

A row is first synced to disk, then its record is appended to the index. Records and rows never
change afterwards. Readers therefore need no lock. Rows without a record are ignored.
The rows that a run needs are compared with their checksums when it opens the store, so that rows
that were changed on the disk are noticed.
`PixelStore.reset` starts a new rows file with a new number. Readers of the old file can continue,
and an index never refers to the rows of another file.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from serving.imaging.preprocess import Pixels
from serving.utils.files import atomic_write
from serving.utils.parallel import map_ordered

FORMAT: Final = 2
FLUSH_BYTES: Final = 32 * 2**20
"""Size of new rows, in bytes, at which a writer syncs them to disk and adds them to the index."""

_MAGIC: Final = b"fledge pixels %d\n" % FORMAT
_HEADER: Final = re.compile(re.escape(_MAGIC) + rb"([0-9a-f]{16})\n")
_HEADER_BYTES: Final = len(_MAGIC) + 17
_RECORD: Final = np.dtype(
    [("digest", "V16"), ("aspect", "<f4"), ("pixels", "<u4"), ("check", "<u4")]
)
_PRIMES: Final = np.array([3, 5, 7, 11, 13, 17], np.uint32)
_GROUP: Final = 64  # rows that a thread compares in one call


@dataclass(frozen=True)
class StoreIndex:
    """The rows (pixels of one photo each) that a store contains.

    Attributes:
        pixels: Memory-mapped pixels, uint8 [rows, S, S, 3].
        rows: Hash of each photo -> its position in `pixels`.
        aspect: Width / height of each photo, float32 [rows].
        checksums: CRC-32 of the pixels of each photo, uint32 [rows].
        path: Path of the rows file; None if the store is empty.
        size: Size of the rows file in bytes, including unused space at the end.
    """

    pixels: Pixels = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    rows: dict[bytes, int] = field(default_factory=dict)
    aspect: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    checksums: npt.NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    path: Path | None = None
    size: int = 0

    def count_damaged(self, rows: Iterable[int]) -> int:
        """Return how many of some rows differ from their checksums. Several threads read them.

        Args:
            rows: Positions in `pixels`.
        """

        def count(group: Sequence[int]) -> int:
            return sum(zlib.crc32(self.pixels[row]) != self.checksums[row] for row in group)

        ordered = sorted(set(rows))
        groups = (ordered[at : at + _GROUP] for at in range(0, len(ordered), _GROUP))
        return sum(map_ordered(count, groups))


@dataclass
class PixelWriter:
    """Appends rows (pixels of one photo each) to a rows file, and their records to the index.

    Attributes:
        file: The rows file, open for writing.
        index: The index, open for writing without a buffer; None if the rows file is temporary and
            has no index.
        row_bytes: Size of a row in bytes.
        rows: Hash of each photo -> position of the photo's row; `add` adds an entry.
        aspect: Width / height of the photo of each row; `add` appends a value.
        checksums: CRC-32 of the pixels of each row; `add` appends a value.
    """

    file: BinaryIO
    index: FileIO | None
    row_bytes: int
    rows: dict[bytes, int]
    aspect: list[float]
    checksums: list[int] = field(default_factory=list)
    _listed: int = 0

    def __post_init__(self) -> None:
        """Seek to the end of the rows that the index lists already."""
        self._listed = len(self.aspect)
        self._digests = list(self.rows)
        self.file.seek(self._listed * self.row_bytes)

    def add(self, digest: bytes, pixels: Pixels, aspect: float) -> None:
        """Append the pixels of a photo, unless a photo with the same hash is stored already.

        Args:
            digest: Hash of the photo's bytes.
            pixels: Pixels, uint8 [S, S, 3].
            aspect: Width / height of the photo.
        """
        if digest in self.rows:
            return
        data = np.ascontiguousarray(pixels).data
        self.file.write(data)
        self.rows[digest] = len(self.aspect)
        self.aspect.append(aspect)
        self.checksums.append(zlib.crc32(data))
        self._digests.append(digest)
        if (len(self.aspect) - self._listed) * self.row_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Sync the new rows (decoded photos) to disk, then append their records to the index."""
        self.file.flush()
        if self.index is None:
            return
        os.fsync(self.file.fileno())
        records = np.empty(len(self.aspect) - self._listed, _RECORD)
        records["digest"] = np.array(self._digests[self._listed :], "V16")
        records["aspect"] = self.aspect[self._listed :]
        records["pixels"] = self.checksums[self._listed :]
        records["check"] = _checks(records)
        data = records.tobytes()
        try:
            while data:
                data = data[self.index.write(data) :]
        except OSError:
            # Else the index would list rows that `close` cuts off, and all rows would be discarded.
            with suppress(OSError):
                self.index.truncate(_HEADER_BYTES + self._listed * _RECORD.itemsize)
            raise
        self._listed = len(self.aspect)

    def close(self) -> None:
        """Close the files, after cutting off reserved space and rows that the index does not list.

        Such rows are always at the end of the file.
        """
        with self.file, self.index or nullcontext():
            self.file.flush()
            self.file.truncate(self._listed * self.row_bytes)


@dataclass(frozen=True)
class PixelStore:
    """Store of the decoded photos of one `PixelTransform`.

    folder: Folder of the store, an entry of the disk cache. side: Side S of the photos in pixels.
    """

    folder: Path
    side: int

    @property
    def row_bytes(self) -> int:
        return 3 * self.side**2

    def read(self) -> StoreIndex:
        """Read the index and map the rows; empty if the files don't exist or are damaged.

        Raises:
            OSError: The files exist but can't be read.
        """
        try:
            data = (self.folder / "index").read_bytes()
            header = _HEADER.match(data)
            if not header:
                return StoreIndex()
            path = self.folder / f"rows-{header[1].decode()}.bin"
            # A killed writer may have left an incomplete record at the end.
            count = (len(data) - _HEADER_BYTES) // _RECORD.itemsize
            records = np.frombuffer(data, _RECORD, count, _HEADER_BYTES)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < count * self.row_bytes or (_checks(records) != records["check"]).any():
                    return StoreIndex()
                pixels = map_rows(file, count, self.side)
        except FileNotFoundError:
            return StoreIndex()
        digests = (digest.tobytes() for digest in records["digest"])
        rows = {digest: row for row, digest in enumerate(digests)}
        aspect, checksums = records["aspect"].astype(np.float32), records["pixels"].copy()
        return StoreIndex(pixels, rows, aspect, checksums, path, size)

    def bytes_needed(self, index: StoreIndex, more: int) -> int:
        """Return how many bytes the rows file grows when `more` rows (photos) are added."""
        return max(0, (len(index.rows) + more) * self.row_bytes - index.size)

    def reset(self) -> None:
        """Replace the store's files by empty ones. The caller must hold the cache entry's lock."""
        number = secrets.token_hex(8)
        path = self.folder / f"rows-{number}.bin"
        path.touch(mode=0o600, exist_ok=False)
        with atomic_write(self.folder / "index", 0o600) as partial:
            partial.write_bytes(_MAGIC + number.encode() + b"\n")
        for old in self.folder.glob("rows-*.bin"):
            if old != path:
                old.unlink()

    def remove_stale(self, index: StoreIndex) -> None:
        """Remove the files that a killed `reset` left, because they count as a part of the store.

        The caller must hold the cache entry's lock, and have read `index` since.
        """
        for path in (*self.folder.glob("rows-*.bin"), *self.folder.glob(".index.*.partial")):
            if path != index.path:
                path.unlink(missing_ok=True)

    def writer(self, index: StoreIndex, more: int) -> PixelWriter:
        """Return a writer that appends rows (photos), and reserve disk space for `more` rows.

        The caller must hold the lock of the cache entry.

        Args:
            index: The current index, read after the lock was acquired.
            more: Number of rows to reserve space for.

        Raises:
            OSError: The disk is full, or the files can't be written.
        """
        if index.path is None:
            self.reset()
            index = self.read()
        assert index.path is not None  # created by reset()
        end = len(index.rows) * self.row_bytes
        records = (self.folder / "index").open("r+b", buffering=0)
        records.truncate(_HEADER_BYTES + len(index.rows) * _RECORD.itemsize)
        records.seek(0, os.SEEK_END)
        file = index.path.open("r+b")
        writer = PixelWriter(
            file,
            records,
            self.row_bytes,
            dict(index.rows),
            index.aspect.tolist(),
            index.checksums.tolist(),
        )
        try:
            reserve(file, end + more * self.row_bytes, self.folder)
        except OSError:
            writer.close()
            raise
        return writer


def map_rows(file: BinaryIO, count: int, side: int) -> Pixels:
    """Memory-map the first `count` rows of a rows file: uint8 [count, side, side, 3]."""
    shape = (count, side, side, 3)
    if not count:  # mmap refuses empty files
        return np.empty(shape, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r", shape=shape))


def reserve(file: BinaryIO, size: int, folder: Path) -> None:
    """Allocate disk space for a file, to detect a full disk before anything is written.

    Args:
        file: The file, open for writing.
        size: Size of the file in bytes.
        folder: Folder that contains the file.

    Raises:
        OSError: The disk has too little free space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
        return
    have = os.fstat(file.fileno()).st_size
    if shutil.disk_usage(folder).free < size - have:
        raise OSError("too little disk space")
    file.truncate(max(size, have))


def _checks(records: npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
    """Compute checksums of index records. Incomplete and all-zero records fail the check."""
    words = np.frombuffer(records.tobytes(), "<u4").reshape(len(records), len(_PRIMES) + 1)
    sums = (words[:, :-1] * _PRIMES).sum(axis=1, dtype=np.uint32) ^ np.uint32(0x5EED)
    return np.asarray(sums)
