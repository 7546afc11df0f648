"""On-disk store of decoded photos, safe against crashes at any moment.

    index            header, then one record per row: digest of the photo, aspect ratio, checksum
    rows-NUMBER.bin  uint8 [rows, S, S, 3]; the header of the index contains NUMBER

A record is appended to the index after its row was synced to disk, and never changes afterwards, so
readers need no lock. Rows after the last record are unused. `PixelStore.reset` starts a new rows
file with a new number, so that readers of the old file can continue, and an index never refers to
the rows of another file.
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
from serving.utils.files import atomic_write

FORMAT: Final = 1
FLUSH_BYTES: Final = 32 * 2**20
"""A writer syncs its rows and adds them to the index whenever they reach this size."""

_MAGIC: Final = b"fledge pixels %d\n" % FORMAT
_HEADER: Final = re.compile(re.escape(_MAGIC) + rb"([0-9a-f]{16})\n")
_HEADER_BYTES: Final = len(_MAGIC) + 17
_RECORD: Final = np.dtype([("digest", "V16"), ("aspect", "<f4"), ("check", "<u4")])
_PRIMES: Final = np.array([3, 5, 7, 11, 13], np.uint32)


@dataclass(frozen=True)
class StoreIndex:
    """The rows in a store.

    Attributes:
        pixels: uint8 [rows, S, S, 3], mapped from the file.
        rows: Digest of a photo -> its row.
        aspect: float32 [rows], width / height.
        path: The rows file, or None if the store is empty.
        size: Bytes of the file, including unused space at its end.
    """

    pixels: Pixels = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    rows: dict[bytes, int] = field(default_factory=dict)
    aspect: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    path: Path | None = None
    size: int = 0


@dataclass
class PixelWriter:
    """Appends rows to a rows file, and their records to the index.

    Attributes:
        file: The rows file, open for writing.
        index: The index, open for writing; None for a temporary file without one.
        row_bytes: Size of a row.
        rows, aspect: As in `StoreIndex`; updated by `add`.
    """

    file: BinaryIO
    index: BinaryIO | None
    row_bytes: int
    rows: dict[bytes, int]
    aspect: list[float]
    _listed: int = 0

    def __post_init__(self) -> None:
        """Continue after the given rows, which are in the index already."""
        self._listed = len(self.aspect)
        self._digests = list(self.rows)
        self.file.seek(self._listed * self.row_bytes)

    def add(self, digest: bytes, pixels: Pixels, aspect: float) -> None:
        """Append a row, unless the photo has one already."""
        if digest in self.rows:
            return
        self.file.write(np.ascontiguousarray(pixels).data)
        self.rows[digest] = len(self.aspect)
        self.aspect.append(aspect)
        self._digests.append(digest)
        if (len(self.aspect) - self._listed) * self.row_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Sync the added rows to disk, then append their records to the index."""
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
        """Close the files; truncate reserved space and rows that are not in the index."""
        with self.file, self.index or nullcontext():
            self.file.flush()
            self.file.truncate(self._listed * self.row_bytes)


@dataclass(frozen=True)
class PixelStore:
    """The store of one `PixelTransform`. folder: an entry of the cache; side: S, in pixels."""

    folder: Path
    side: int

    @property
    def row_bytes(self) -> int:
        return 3 * self.side**2

    def read(self) -> StoreIndex:
        """The current index; empty if it does not exist or is damaged.

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
        return StoreIndex(pixels, rows, records["aspect"].astype(np.float32), path, size)

    def bytes_needed(self, index: StoreIndex, more: int) -> int:
        """Bytes by which the file grows when `more` rows are added."""
        return max(0, (len(index.rows) + more) * self.row_bytes - index.size)

    def reset(self) -> None:
        """Start an empty rows file. The caller must hold the lock of the cache entry."""
        number = secrets.token_hex(8)
        path = self.folder / f"rows-{number}.bin"
        path.touch()
        with atomic_write(self.folder / "index") as partial:
            partial.write_bytes(_MAGIC + number.encode() + b"\n")
        for old in self.folder.glob("rows-*.bin"):
            if old != path:
                old.unlink()

    def writer(self, index: StoreIndex, more: int) -> PixelWriter:
        """Append after the rows of `index`, with disk space reserved for `more` rows.

        The caller must hold the lock of the cache entry, and must have read `index` while holding
        it.

        Raises:
            OSError: The disk is full, or can't be written.
        """
        if index.path is None:
            self.reset()
            index = self.read()
        assert index.path is not None  # created by reset()
        end = len(index.rows) * self.row_bytes
        records = (self.folder / "index").open("r+b")
        records.truncate(_HEADER_BYTES + len(index.rows) * _RECORD.itemsize)
        records.seek(0, os.SEEK_END)
        file = index.path.open("r+b")
        writer = PixelWriter(file, records, self.row_bytes, dict(index.rows), index.aspect.tolist())
        try:
            reserve(file, end + more * self.row_bytes, self.folder)
        except OSError:
            writer.close()
            raise
        return writer


def map_rows(file: BinaryIO, count: int, side: int) -> Pixels:
    """Memory-map the first `count` rows: uint8 [count, side, side, 3]."""
    shape = (count, side, side, 3)
    if not count:  # mmap refuses empty files
        return np.empty(shape, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r", shape=shape))


def reserve(file: BinaryIO, size: int, folder: Path) -> None:
    """Allocate disk space for `size` bytes, so that a full disk raises an error before the work.

    folder: the folder of the file.

    Raises:
        OSError: There is too little free space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
        return
    have = os.fstat(file.fileno()).st_size
    if shutil.disk_usage(folder).free < size - have:
        raise OSError("too little disk space")
    file.truncate(max(size, have))


def _checks(records: npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
    """A checksum per record; it differs for incomplete and for all-zero records."""
    words = np.frombuffer(records.tobytes(), "<u4").reshape(len(records), len(_PRIMES) + 1)
    sums = (words[:, :-1] * _PRIMES).sum(axis=1, dtype=np.uint32) ^ np.uint32(0x5EED)
    return np.asarray(sums)
