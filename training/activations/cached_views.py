"""Cache of the outputs of frozen layers for augmented photos.

Random augmentations are numbered. Augmented view number n of a list of photos contains every photo
once, after augmentation number n. The frozen layers run once per view. Their outputs are stored in
memory or in the disk cache. On disk, a folder (a cache entry) belongs to one frozen network and one
list of photos, and contains one file per view:

    view-NUMBER.bin  one row (the outputs for one photo) per photo, channels last; then a checksum

The file is written under a temporary name, then renamed, and never changes afterwards. Readers
therefore need no lock. The folder's name is a hash of everything that determines the outputs. After
a change of weights or augmentation, another folder is used. A view that was changed on the disk is
noticed by its checksum when a run opens it, and computed again.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from serving.utils.files import utf8_path
from serving.utils.progress import progress_bar
from training.pixels.store import reserve
from training.utils import disk_cache
from training.utils.console import Log
from training.utils.device import CPU

TRAILER_BYTES: Final = 8
"""Bytes that follow the outputs for a view in its file."""

IndexedRows = tuple[Tensor, Tensor]
"""Indices of n photos, int64 [n], and the outputs of the frozen layers for them, [n, ...]."""

ComputeView = Callable[[int], Iterator[IndexedRows]]
"""A function: number of an augmented view -> batches of all its rows, in any order."""


@dataclass(frozen=True)
class ViewShape:
    """Shape and dtype of the outputs for one augmented view: an array [photos, *row].

    Attributes:
        photos: Number of photos.
        row: Shape of the outputs for one photo.
        dtype: Dtype of the outputs.
    """

    photos: int
    row: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Size of the array in bytes."""
        return self.count * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Number of elements of the array."""
        return self.photos * math.prod(self.row)

    def unflatten(self, flat: Tensor) -> Tensor:
        """Reshape a flat tensor to [photos, *row] without a copy.

        If a row is a feature map [C, H, W], the flat tensor is in the order H, W, C.
        """
        if len(self.row) != 3:
            return flat.view(self.photos, *self.row)
        channels, height, width = self.row
        return flat.view(self.photos, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class DiskStore:
    """Storage of the outputs of one frozen network in one entry (folder) of the disk cache.

    A view is the outputs for one numbered random augmentation of all photos.

    Attributes:
        cache: The disk cache.
        name: Name of the entry.
        description: Content of the entry in words, for `fledge cache` and the log.
        protected: Names of entries that are not evicted to make space for new views.
        log: Function that writes a log line.
    """

    cache: disk_cache.DiskCache
    name: str
    description: str
    protected: Set[str]
    log: Log

    @property
    def folder(self) -> Path:
        """Folder of the entry."""
        return self.cache.folder / self.name

    def find(self, number: int, shape: ViewShape) -> Tensor | None:
        """Return the stored outputs for augmented view `number`; None if missing or damaged."""
        path = self._path(number)
        try:
            disk_cache.check_private(self.folder)
            if path.stat().st_size != shape.size + TRAILER_BYTES:
                return None
            with path.open("rb") as file:
                file.seek(shape.size)
                trailer = file.read()
            flat = _map_file(path, shape, shared=False)
        except (OSError, RuntimeError):
            return None
        if trailer != _trailer(flat):
            self.log(
                f"warning: a cached view of {self.description} was changed on the disk; it is "
                "computed again"
            )
            return None
        disk_cache.mark_used(self.folder)
        return shape.unflatten(flat)

    def find_or_add(
        self, number: int, shape: ViewShape, parts: Iterator[IndexedRows]
    ) -> Tensor | None:
        """Return the outputs for an augmented view. If the cache lacks them, first add them.

        Args:
            number: Number of the view.
            shape: Shape and dtype of the view's array.
            parts: Batches of (indices of photos, outputs for these photos) that cover all photos.
                Not read if the cache has the outputs.

        Returns:
            The array of outputs; None if it does not fit into the size limit of the cache.

        Raises:
            OSError: The cache folder can't be written.
        """
        with disk_cache.locked_entry(self.folder, self.description, self._log_waiting):
            found = self.find(number, shape)  # another process may have stored it meanwhile
            if found is not None:
                return found
            for stale in self.folder.glob("partial-*.bin"):  # left by a killed process
                stale.unlink()
            partial = self.folder / f"partial-{secrets.token_hex(8)}.bin"
            try:
                with self.cache.locked():
                    size = shape.size + TRAILER_BYTES
                    if not self.cache.evict(size, {*self.protected, self.name}):
                        return None
                    with open(partial, "x+b", opener=disk_cache.private) as file:
                        # A full disk is an error here; in a mapped file it would kill the process.
                        reserve(file, size, self.folder)
                flat = _map_file(partial, shape, shared=True)
                rows = fill(shape.unflatten(flat), parts)
                with partial.open("r+b") as file:
                    file.seek(shape.size)
                    file.write(_trailer(flat))
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(self._path(number))
            finally:
                partial.unlink(missing_ok=True)
            return rows

    def _path(self, number: int) -> Path:
        return self.folder / f"view-{number:016x}.bin"

    def _log_waiting(self) -> None:
        self.log(f"frozen layers: waiting for another run that computes {self.description}")


@dataclass
class CachedViews:
    """Outputs of one frozen network for augmented views; each view is computed at its first use.

    Attributes:
        shape: Shape and dtype of a view's array.
        compute: Function that computes the outputs for a view.
        store: Storage on disk; None: views are stored in memory.
        source: Cached outputs of the layers before this network, which are the inputs of `compute`.
            None: the inputs are photos.
        device: Device of outputs that are stored in memory.
    """

    shape: ViewShape
    compute: ComputeView
    store: DiskStore | None = None
    source: CachedViews | None = None
    device: torch.device = CPU
    _views: dict[int, Tensor] = field(default_factory=dict)
    _advance: Callable[[int], object] = field(default=lambda photos: None)

    def __getitem__(self, number: int) -> Tensor:
        """Return the outputs for augmented view `number`, [photos, ...]; do not modify them."""
        if number not in self._views:
            self._views[number] = self._find_or_compute(number)
        return self._views[number]

    def prepare(self, numbers: Iterable[int]) -> None:
        """Compute the outputs for augmented views that are not stored yet, with a progress bar."""
        missing = [number for number in numbers if not self._load_if_stored(number)]
        if self.source:
            self.source.prepare(missing)
        if not missing:
            return
        with progress_bar() as bar:
            task = bar.add_task("frozen layers", total=len(missing) * self.shape.photos)
            self._advance = lambda photos: bar.advance(task, photos)
            for number in missing:
                self[number]
        self._advance = lambda photos: None

    def _load_if_stored(self, number: int) -> bool:
        if number not in self._views and self.store:
            found = self.store.find(number, self.shape)
            if found is not None:
                self._views[number] = found
        return number in self._views

    def _find_or_compute(self, number: int) -> Tensor:
        if self.store:
            try:
                found = self.store.find_or_add(number, self.shape, self._parts(number))
                if found is not None:
                    return found
            except OSError as error:
                where = disk_cache.abbreviate_home(self.store.cache.folder)
                reason = error.strerror or error
                self.store.log(f"warning: the cache {where} can't be used: {reason}")
            self.store = None
        flat = torch.empty(self.shape.count, dtype=self.shape.dtype, device=self.device)
        return fill(self.shape.unflatten(flat), self._parts(number))

    def _parts(self, number: int) -> Iterator[IndexedRows]:
        for index, rows in self.compute(number):
            yield index, rows
            self._advance(len(index))


def fill(rows: Tensor, parts: Iterable[IndexedRows]) -> Tensor:
    """Write batches of rows into the tensor `rows` at their indices, and return `rows`."""
    for index, part in parts:
        rows[index] = part.to(rows.device)
    return rows


def _map_file(path: Path, shape: ViewShape, *, shared: bool) -> Tensor:
    with utf8_path(path) as name:
        return torch.from_file(name, shared=shared, size=shape.count, dtype=shape.dtype)


def _trailer(flat: Tensor) -> bytes:
    """Return what follows the outputs in a file: a mark and a checksum."""
    value = disk_cache.checksum(flat.view(torch.uint8).numpy().data)
    return b"crc\n" + value.to_bytes(4, "little")
