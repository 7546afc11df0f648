"""What frozen layers make of numbered views of every photo, each view computed once and kept.

An entry of the cache is the views of one frozen network on one list of photos:

    view-NUMBER.bin  rows of one view in the order of the photos, channels last

A file gets its name when all of it is on the disk and never changes afterwards, so readers need no
lock. What decides the rows decides the name of the entry, so they are never stale.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from serving.utils.progress import progress_bar
from training.pixels.store import reserve
from training.utils import disk_cache
from training.utils.device import CPU

Part = tuple[Tensor, Tensor]
"""Index of some photos, int64 [n], and their rows, [n, ...]."""

Make = Callable[[int], Iterator[Part]]
"""A view's number -> its rows, part by part, in any order."""


@dataclass(frozen=True)
class Shape:
    """Of the rows of a view: how many, [N, ...] of one, and their dtype."""

    photos: int
    row: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of a view."""
        return self.count * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Numbers of a view."""
        return self.photos * math.prod(self.row)

    def tensor(self, flat: Tensor) -> Tensor:
        """The rows [N, ...] that lie as `flat`, feature maps being channels-last."""
        if len(self.row) != 3:
            return flat.view(self.photos, *self.row)
        channels, height, width = self.row
        return flat.view(self.photos, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class DiskStore:
    """Where views outlive the run. keep: names of entries that do not go to make room for them."""

    room: disk_cache.DiskCache
    name: str
    what: str
    keep: Set[str]
    log: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """Of the entry."""
        return self.room.folder / self.name

    def find(self, number: int, shape: Shape) -> Tensor | None:
        """A view that is kept; None where it is not, or is not whole."""
        path = self._path(number)
        try:
            if path.stat().st_size != shape.size:
                return None
            flat = _mapped(path, shape, shared=False)
        except (OSError, RuntimeError):
            return None
        disk_cache.touch(self.folder)
        return shape.tensor(flat)

    def put(self, number: int, shape: Shape, parts: Iterator[Part]) -> Tensor | None:
        """Compute and keep a view; None where there is no room for it.

        Raises:
            OSError: The cache can't be written.
        """
        with disk_cache.held(self.folder, self.what, self._wait):
            found = self.find(number, shape)  # whoever held it before may have made it
            if found is not None:
                return found
            for left in self.folder.glob("partial-*.bin"):  # its writer was killed
                left.unlink()
            partial = self.folder / f"partial-{secrets.token_hex(8)}.bin"
            try:
                with self.room.alone():
                    if not self.room.make_room(shape.size, {*self.keep, self.name}):
                        return None
                    with partial.open("w+b") as file:
                        # A full disk is known now: in a mapped file it would end the process.
                        reserve(file, shape.size, self.folder)
                rows = fill(shape.tensor(_mapped(partial, shape, shared=True)), parts)
                with partial.open("r+b") as file:
                    os.fsync(file.fileno())
                partial.rename(self._path(number))
            finally:
                partial.unlink(missing_ok=True)
            return rows

    def _path(self, number: int) -> Path:
        return self.folder / f"view-{number:016x}.bin"

    def _wait(self) -> None:
        self.log(f"frozen part: another run computes {self.what}: waiting for it")


@dataclass
class CachedViews:
    """The views of one frozen network, each computed when it is first asked for.

    shelf: where they are kept between runs; None keeps them in memory, that of `device`. below: the
    views that `make` works on.
    """

    shape: Shape
    make: Make
    store: DiskStore | None = None
    below: CachedViews | None = None
    device: torch.device = CPU
    _open: dict[int, Tensor] = field(default_factory=dict)
    _advance: Callable[[int], object] = field(default=lambda photos: None)

    def __getitem__(self, number: int) -> Tensor:
        """Rows [N, ...] of a view, not to be written to."""
        if number not in self._open:
            self._open[number] = self._get(number)
        return self._open[number]

    def prepare(self, numbers: Iterable[int]) -> None:
        """Compute the views that are missing, under a bar."""
        missing = [number for number in numbers if not self._have(number)]
        if self.below:
            self.below.prepare(missing)
        if not missing:
            return
        with progress_bar() as bar:
            task = bar.add_task("frozen layers", total=len(missing) * self.shape.photos)
            self._advance = lambda photos: bar.advance(task, photos)
            for number in missing:
                self[number]
        self._advance = lambda photos: None

    def _have(self, number: int) -> bool:
        if number not in self._open and self.store:
            found = self.store.find(number, self.shape)
            if found is not None:
                self._open[number] = found
        return number in self._open

    def _get(self, number: int) -> Tensor:
        if self.store:
            try:
                found = self.store.put(number, self.shape, self._parts(number))
                if found is not None:
                    return found
            except OSError as error:
                where, why = disk_cache.shown(self.store.room.folder), error.strerror or error
                self.store.log(f"warning: the cache {where} can't be used: {why}")
            self.store = None
        flat = torch.empty(self.shape.count, dtype=self.shape.dtype, device=self.device)
        return fill(self.shape.tensor(flat), self._parts(number))

    def _parts(self, number: int) -> Iterator[Part]:
        for index, rows in self.make(number):
            yield index, rows
            self._advance(len(index))


def fill(rows: Tensor, parts: Iterable[Part]) -> Tensor:
    """Write the parts into `rows`, and return them."""
    for index, part in parts:
        rows[index] = part.to(rows.device)
    return rows


def _mapped(path: Path, shape: Shape, *, shared: bool) -> Tensor:
    return torch.from_file(str(path), shared=shared, size=shape.count, dtype=shape.dtype)
