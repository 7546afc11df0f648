"""Decode the photos of one split (train or valid) of a dataset.

The pixels are stored in the disk cache or in a temporary file, or the photos are decoded at each
access ("streamed"). A row is the uint8 pixels of one photo.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from serving.errors import ImageError, WorkError
from serving.imaging.preprocess import Pixels
from serving.utils.parallel import map_ordered
from serving.utils.progress import progress_bar
from training.data.dataset import Sample
from training.pixels.rows import (
    MemmapRows,
    Rows,
    StreamingRows,
    content_digest,
    read_content,
    read_photo,
)
from training.pixels.store import PixelStore, PixelWriter, StoreIndex, map_rows, reserve
from training.pixels.transform import PixelTransform
from training.utils import disk_cache
from training.utils.console import Log

Result = TypeVar("Result")


@dataclass(frozen=True)
class PixelSet:
    """The decoded photos of one split (train or valid) of a dataset.

    Attributes:
        pixels: Rows: the pixels of each photo, uint8 [S, S, 3].
        aspect: Width / height of each photo, float32 [N]; 1 if `Preprocess.fit` is not "crop".
        labels: Class index of each photo, int64 [N].
        name: Name of the entry in the disk cache.
        key: Hash of everything that determines the pixels, 32 bytes.
    """

    pixels: Rows
    aspect: Tensor
    labels: Tensor
    name: str = ""
    key: bytes = b""

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.labels)


@dataclass
class PixelPart:
    """Decoder of the photos of one split (train or valid) of a dataset.

    Call `read_digests`, then one of `store_in_cache`, `store_in_temporary_file` and `stream`, then
    `pixel_set`.

    Attributes:
        samples: The photos and their class indices.
        transform: Computes the pixels of a photo.
        log: Function that writes a log line.
        digests: Hash of the bytes of each photo; b"" if the photo is unreadable.
        unreadable: Path of each unreadable photo -> reason.
        decoded: Number of photos that were decoded and stored.
        aspect: Width / height of each readable photo, float32 [N].
        rows: Pixels of the readable photos; None until they are stored or streamed.
    """

    samples: Sequence[Sample]
    transform: PixelTransform
    log: Log
    digests: list[bytes] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    decoded: int = 0
    aspect: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Rows | None = None

    @property
    def readable(self) -> list[int]:
        """Indices of all photos except those in `unreadable`."""
        return [i for i, sample in enumerate(self.samples) if sample.path not in self.unreadable]

    @property
    def size(self) -> int:
        """Number of bytes of the pixels. Identical photos are stored and counted once."""
        return len({self.digests[i] for i in self.readable}) * 3 * self.transform.side**2

    def read_digests(self) -> None:
        """Read every photo and set `digests` to the hashes of the files' bytes."""

        def digest(index: int) -> bytes:
            path = self.samples[index].path
            try:
                return content_digest(read_content(path))
            except ImageError as error:
                self.unreadable[path] = _reason(path, error)
                return b""

        self.digests = list(self._map("reading", digest, range(len(self.samples))))

    def store_in_cache(self, cache: disk_cache.DiskCache, protected: set[str]) -> None:
        """Store missing photos in the disk cache, and set `rows` to the cached pixels.

        If the pixels don't fit into the size limit of the cache, `rows` stays None.

        Args:
            cache: The disk cache.
            protected: Names of cache entries that are not evicted to make space.

        Raises:
            OSError: The cache folder can't be written, or others can write to it.
        """
        store = PixelStore(cache.folder / self.transform.name, self.transform.side)
        disk_cache.check_private(store.folder)
        index = store.read()
        if self._missing(index.rows) or self._count_damaged(index):
            with disk_cache.locked_entry(store.folder, str(self.transform), self._log_waiting):
                index = self._add_missing(store, store.read(), cache, protected)
        if not self._missing(index.rows):
            disk_cache.mark_used(store.folder)
            self._select_rows(index)

    def _add_missing(
        self,
        store: PixelStore,
        index: StoreIndex,
        cache: disk_cache.DiskCache,
        protected: set[str],
    ) -> StoreIndex:
        """Decode the photos that `store` lacks, add them to the store, and return the new index.

        If rows of this dataset are damaged, or if space is short and the store contains photos of
        other datasets, the store is emptied first, and all photos of this dataset are decoded.
        """
        damaged = self._count_damaged(index)
        if damaged:
            self.log(
                f"warning: {damaged} of the cached {self.transform.part} photos were changed on "
                "the disk; all are decoded again"
            )
            store.reset()
            index = store.read()
        store.remove_stale(index)
        with cache.locked():
            more = len({self.digests[i] for i in self._missing(index.rows)})
            needed = store.bytes_needed(index, more)
            unused = len(index.rows) + more - self.size // store.row_bytes
            if not cache.evict(needed, protected) and unused:
                store.reset()
                index, more = StoreIndex(), self.size // store.row_bytes
                needed = self.size
            # The entry of the other part may be evicted, because its files are open already.
            if not cache.evict(needed, {self.transform.name}):
                return index
            writer = store.writer(index, more)
        with closing(writer):
            self._decode_missing(writer)
        return store.read()

    def _count_damaged(self, index: StoreIndex) -> int:
        """Return how many of the cached photos of this dataset differ from their checksums."""
        own = {self.digests[i] for i in self.readable}
        return index.count_damaged(index.rows[digest] for digest in own & index.rows.keys())

    def _log_waiting(self) -> None:
        self.log(f"pixels: waiting for another run that decodes {self.transform}")

    def store_in_temporary_file(self) -> None:
        """Decode all photos into an unnamed temporary file, and set `rows` to its pixels.

        The operating system deletes the file when the process ends.

        Raises:
            WorkError: The disk has too little free space.
        """
        try:
            self._store_in_temporary_file()
        except OSError as error:
            raise WorkError(
                f"decoded photos need {self.size / 1e9:.1f} GB in {tempfile.gettempdir()}: "
                f"{error.strerror or error}; free some, set TMPDIR, or use --cache-gb 0"
            ) from error

    def _store_in_temporary_file(self) -> None:
        self.decoded = 0
        with tempfile.TemporaryFile(prefix="fledge-pixels-") as file:
            reserve(file, self.size, Path(tempfile.gettempdir()))
            writer = PixelWriter(file, None, 3 * self.transform.side**2, {}, [])
            self._decode_missing(writer)
            pixels = map_rows(file, len(writer.rows), self.transform.side)
            self._select_rows(StoreIndex(pixels, writer.rows, np.array(writer.aspect, np.float32)))

    def _decode_missing(self, writer: PixelWriter) -> None:
        """Decode the photos that `writer` does not have yet, with several threads.

        Photos that can't be decoded are added to `unreadable`.
        """
        to_square = self.transform.to_square

        def decode(index: int) -> tuple[int, bytes, Pixels, float] | None:
            path = self.samples[index].path
            try:
                digest, photo = read_photo(path, to_square)
                return index, digest, self.transform(photo), self.transform.aspect(photo)
            except ImageError as error:
                self.unreadable[path] = _reason(path, error)
                return None

        for row in self._map("decoding", decode, self._missing(writer.rows)):
            if row:
                index, digest, pixels, aspect = row
                self.digests[index] = digest  # the file may have changed since `read_digests`
                writer.add(digest, pixels, aspect)
                self.decoded += 1
        writer.flush()

    def _missing(self, rows: dict[bytes, int]) -> list[int]:
        """Return the indices of the readable photos whose hash is not in `rows`."""
        return [i for i in self.readable if self.digests[i] not in rows]

    def _select_rows(self, index: StoreIndex) -> None:
        rows = np.array([index.rows[self.digests[i]] for i in self.readable], np.int64)
        self.aspect = torch.from_numpy(index.aspect[rows])
        self.rows = MemmapRows(index.pixels, rows)

    def stream(self) -> None:
        """Set `rows` to a source that decodes photos at each access and stores nothing.

        Every photo is decoded once in advance to find unreadable photos.
        """
        to_square = self.transform.to_square

        def check(index: int) -> tuple[bytes, float]:
            path = self.samples[index].path
            try:
                digest, photo = read_photo(path, to_square)
                return digest, self.transform.aspect(photo)
            except ImageError as error:
                self.unreadable[path] = _reason(path, error)
                return b"", 1.0

        indices = self.readable
        checked = list(self._map("checking", check, indices))
        for index, (digest, _) in zip(indices, checked, strict=True):
            self.digests[index] = digest
        still = set(self.readable)
        aspect = [ratio for i, (_, ratio) in zip(indices, checked, strict=True) if i in still]
        self.aspect = torch.tensor(aspect, dtype=torch.float32)
        paths = [self.samples[i].path for i in self.readable]
        digests = [self.digests[i] for i in self.readable]
        self.rows = StreamingRows(paths, digests, self.transform, to_square)

    def _map(
        self, verb: str, function: Callable[[int], Result], photos: Sequence[int]
    ) -> Iterator[Result]:
        """Yield `function(photo)` of each photo, in order, with several threads and a progress bar.

        verb: Text of the progress bar, such as "decoding".
        """
        with progress_bar() as bar, closing(map_ordered(function, photos)) as results:
            title = f"{verb} {self.transform.part}"
            yield from bar.track(results, total=len(photos), description=title)

    def pixel_set(self) -> PixelSet:
        """Return the readable photos as a `PixelSet`. Call a method that sets `rows` first."""
        assert self.rows is not None  # set when the rows were stored or streamed
        labels = torch.tensor([self.samples[i].label for i in self.readable], dtype=torch.int64)
        name = self.transform.name
        key = hashlib.sha256(name.encode() + b"".join(self.digests[i] for i in self.readable))
        return PixelSet(self.rows, self.aspect, labels, name, key.digest())


def _reason(path: Path, error: ImageError) -> str:
    """Return the message of `error` without the leading path."""
    return str(error).removeprefix(f"{path}: ")
