"""Decode one part (train or valid) of a dataset: cached, in a temporary file, or streamed."""

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
    """The decoded photos of one part of a dataset.

    Attributes:
        pixels: Rows of uint8 [S, S, 3].
        aspect: float32 [N], width / height of the photos.
        labels: int64 [N].
        name: Name of the entry in the pixel cache.
        key: 32 bytes: a hash of everything that determines the pixels.
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
    """The photos of a part while they are decoded.

    Call `read_digests`, then one of `store_in_cache`, `store_in_temporary_file` and `stream`, then
    `pixel_set`.

    Attributes:
        samples: The photos.
        transform: Computes the row of a photo.
        log: Takes log lines.
        digests: `content_digest` of each photo, b"" if unreadable.
        unreadable: Path -> reason.
        decoded: Number of photos that were decoded and stored.
        aspect: float32, width / height of the readable photos.
        rows: Rows of the readable photos.
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
        """Indices of the photos that are not known to be unreadable."""
        return [i for i, sample in enumerate(self.samples) if sample.path not in self.unreadable]

    @property
    def size(self) -> int:
        """Bytes of the rows; identical photos share a row."""
        return len({self.digests[i] for i in self.readable}) * 3 * self.transform.side**2

    def read_digests(self) -> None:
        """Read every photo and hash its bytes."""

        def digest(index: int) -> bytes:
            path = self.samples[index].path
            try:
                return content_digest(read_content(path))
            except ImageError as error:
                self.unreadable[path] = _reason(path, error)
                return b""

        self.digests = list(self._map("reading", digest, range(len(self.samples))))

    def store_in_cache(self, cache: disk_cache.DiskCache, protected: set[str]) -> None:
        """Add the missing rows to the cache, and use the rows of the cache.

        `rows` stays None if they don't fit the budget. protected: names of entries that are not
        evicted.

        Raises:
            OSError: The cache can't be written.
        """
        store = PixelStore(cache.folder / self.transform.name, self.transform.side)
        index = store.read()
        if self._missing(index.rows):
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
        """Add the missing rows. If space is short, drop the rows of photos of other datasets."""
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

    def _log_waiting(self) -> None:
        self.log(f"pixels: waiting for another run that decodes {self.transform}")

    def store_in_temporary_file(self) -> None:
        """Decode into an unnamed file; the operating system frees it when the process ends.

        Raises:
            WorkError: The disk is full.
        """
        self.decoded = 0
        with tempfile.TemporaryFile(prefix="fledge-pixels-") as file:
            try:
                reserve(file, self.size, Path(tempfile.gettempdir()))
            except OSError as error:
                raise WorkError(
                    f"decoded photos need {self.size / 1e9:.1f} GB in {tempfile.gettempdir()}: "
                    f"{error.strerror or error}; free some, set TMPDIR, or use --cache-gb 0"
                ) from error
            writer = PixelWriter(file, None, 3 * self.transform.side**2, {}, [])
            self._decode_missing(writer)
            pixels = map_rows(file, len(writer.rows), self.transform.side)
            self._select_rows(StoreIndex(pixels, writer.rows, np.array(writer.aspect, np.float32)))

    def _decode_missing(self, writer: PixelWriter) -> None:
        """Decode the photos without a row in parallel; record those that can't be decoded."""

        def decode(index: int) -> tuple[int, bytes, Pixels, float] | None:
            path = self.samples[index].path
            try:
                digest, image = read_photo(path, self.transform.preprocess.background)
                return index, digest, self.transform(image), image.width / image.height
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
        """Indices of the readable photos that have no row."""
        return [i for i in self.readable if self.digests[i] not in rows]

    def _select_rows(self, index: StoreIndex) -> None:
        rows = np.array([index.rows[self.digests[i]] for i in self.readable], np.int64)
        self.aspect = torch.from_numpy(index.aspect[rows])
        self.rows = MemmapRows(index.pixels, rows)

    def stream(self) -> None:
        """Use rows that are decoded at each access. Decodes each photo once to find broken ones."""
        background = self.transform.preprocess.background

        def check(index: int) -> tuple[bytes, float]:
            path = self.samples[index].path
            try:
                digest, image = read_photo(path, background)
                return digest, image.width / image.height
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
        self.rows = StreamingRows(paths, digests, self.transform, background)

    def _map(
        self, verb: str, function: Callable[[int], Result], photos: Sequence[int]
    ) -> Iterator[Result]:
        """`function` of each photo, in order, computed in parallel, with a progress bar."""
        with progress_bar() as bar, closing(map_ordered(function, photos)) as results:
            title = f"{verb} {self.transform.part}"
            yield from bar.track(results, total=len(photos), description=title)

    def pixel_set(self) -> PixelSet:
        """The readable photos as a `PixelSet`; their rows must have been stored or streamed."""
        assert self.rows is not None  # set when the rows were stored or streamed
        labels = torch.tensor([self.samples[i].label for i in self.readable], dtype=torch.int64)
        name = self.transform.name
        key = hashlib.sha256(name.encode() + b"".join(self.digests[i] for i in self.readable))
        return PixelSet(self.rows, self.aspect, labels, name, key.digest())


def _reason(path: Path, error: ImageError) -> str:
    """The message of `error` without the path before it."""
    return str(error).removeprefix(f"{path}: ")
