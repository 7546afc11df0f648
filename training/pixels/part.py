"""One part of a data set on its way to pixels: from the cache, from a file of its own, streamed."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serving.errors import ImageError, WorkError
from serving.imaging.preprocess import Pixels
from serving.utils.progress import progress_bar
from training.data.dataset import Sample
from training.pixels.rows import (
    MemmapRows,
    Result,
    Rows,
    StreamingRows,
    ahead,
    content,
    digest_of,
    read,
)
from training.pixels.store import PixelStore, PixelWriter, StoreIndex, in_file, reserve
from training.pixels.transform import PixelTransform
from training.utils import disk_cache


@dataclass(frozen=True)
class PixelSet:
    """Decoded photos of one part of a data set.

    pixels: rows of uint8 [S, S, 3]; aspect: float32 [N], width over height; labels: int64 [N].
    name: of the entry of the cache that has such rows. key: 32 bytes that decide all pixels.
    """

    pixels: Rows
    aspect: Tensor
    labels: Tensor
    name: str = ""
    key: bytes = b""

    def __len__(self) -> int:
        """How many photos."""
        return len(self.labels)


@dataclass
class PixelPart:
    """The photos of a part, on their way to rows.

    digests: of each photo; those that broke keep none. broken: why. fresh: how many were decoded to
    be kept. aspect: of the photos that did not break. rows: of those, too.
    """

    samples: Sequence[Sample]
    making: PixelTransform
    log: Callable[[str], None]
    digests: list[bytes] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)
    fresh: int = 0
    aspect: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Rows | None = None

    @property
    def good(self) -> list[int]:
        """The photos that did not break."""
        return [i for i, sample in enumerate(self.samples) if sample.path not in self.broken]

    @property
    def size(self) -> int:
        """Bytes of the rows, those of equal photos once."""
        return len({self.digests[i] for i in self.good}) * 3 * self.making.side**2

    def scan(self) -> None:
        """Read every photo: what it holds is what it is known by."""

        def one(index: int) -> bytes:
            path = self.samples[index].path
            try:
                return digest_of(content(path))
            except ImageError as error:
                self.broken[path] = _why(path, error)
                return b""

        self.digests = list(self._each("reading", one, range(len(self.samples))))

    def keep(self, room: disk_cache.DiskCache, names: set[str]) -> None:
        """Rows from the cache, filled where some are missing; undone where there is no room left.

        Raises:
            OSError: The cache can't be written.
        """
        pack = PixelStore(room.folder / self.making.name, self.making.side)
        listed = pack.read()
        if self._missing(listed.rows):
            with disk_cache.held(pack.folder, str(self.making), self._wait):
                listed = self._grow(pack, pack.read(), room, names)
        if not self._missing(listed.rows):
            disk_cache.touch(pack.folder)
            self._cut(listed)

    def _grow(
        self, pack: PixelStore, listed: StoreIndex, room: disk_cache.DiskCache, names: set[str]
    ) -> StoreIndex:
        """Add the missing rows; where room is short, what other photos left in the pack goes."""
        with room.alone():
            more = len({self.digests[i] for i in self._missing(listed.rows)})
            needed = pack.room_needed(listed, more)
            wasted = len(listed.rows) + more - self.size // pack.row_bytes
            if not room.make_room(needed, names) and wasted:
                pack.begin_anew()
                listed, more = StoreIndex(), self.size // pack.row_bytes
                needed = self.size
            # The other part's rows may go: they are open already.
            if not room.make_room(needed, {self.making.name}):
                return listed
            writer = pack.writer(listed, more)
        with closing(writer):
            self._fill(writer)
        return pack.read()

    def _wait(self) -> None:
        self.log(f"pixels: another run decodes {self.making}: waiting for it")

    def keep_aside(self) -> None:
        """Rows in a file without a name, which the system takes back however this process ends.

        Raises:
            WorkError: The disk is full.
        """
        self.fresh = 0
        with tempfile.TemporaryFile(prefix="fledge-pixels-") as file:
            try:
                reserve(file, self.size, Path(tempfile.gettempdir()))
            except OSError as error:
                raise WorkError(
                    f"decoded photos need {self.size / 1e9:.1f} GB in {tempfile.gettempdir()}: "
                    f"{error.strerror or error}; free some, set TMPDIR, or use --cache-gb 0"
                ) from error
            writer = PixelWriter(file, None, 3 * self.making.side**2, {}, [])
            self._fill(writer)
            pixels = in_file(file, len(writer.rows), self.making.side)
            self._cut(StoreIndex(pixels, writer.rows, np.array(writer.aspect, np.float32)))

    def _fill(self, writer: PixelWriter) -> None:
        """Decode the photos that have no row, in parallel; those that break are noted."""
        missing = self._missing(writer.rows)

        def one(index: int) -> tuple[int, bytes, Pixels, float] | None:
            path = self.samples[index].path
            try:
                digest, image = read(path, self.making.preprocess.background)
                return index, digest, self.making(image), image.width / image.height
            except ImageError as error:
                self.broken[path] = _why(path, error)
                return None

        for done in self._each("decoding", one, missing):
            if done:
                index, digest, pixels, aspect = done
                self.digests[index] = digest  # it may have been changed since it was read
                writer.add(digest, pixels, aspect)
                self.fresh += 1
        writer.flush()

    def _missing(self, rows: dict[bytes, int]) -> list[int]:
        return [i for i in self.good if self.digests[i] not in rows]

    def _cut(self, listed: StoreIndex) -> None:
        rows = np.array([listed.rows[self.digests[i]] for i in self.good], np.int64)
        self.aspect = torch.from_numpy(listed.aspect[rows])
        self.rows = MemmapRows(listed.pixels, rows)

    def stream(self) -> None:
        """Rows that are not kept; every photo is decoded once to find those that are broken."""
        background = self.making.preprocess.background

        def one(index: int) -> tuple[bytes, float]:
            path = self.samples[index].path
            try:
                digest, image = read(path, background)
                return digest, image.width / image.height
            except ImageError as error:
                self.broken[path] = _why(path, error)
                return b"", 1.0

        good = self.good
        found = list(self._each("checking", one, good))
        for index, (digest, _) in zip(good, found, strict=True):
            self.digests[index] = digest
        still = set(self.good)
        aspect = [ratio for index, (_, ratio) in zip(good, found, strict=True) if index in still]
        self.aspect = torch.tensor(aspect, dtype=torch.float32)
        paths = [self.samples[i].path for i in self.good]
        digests = [self.digests[i] for i in self.good]
        self.rows = StreamingRows(paths, digests, self.making, background)

    def _each(
        self, what: str, function: Callable[[int], Result], photos: Sequence[int]
    ) -> Iterator[Result]:
        """`function` of some photos, in order, in parallel and under a bar."""
        with progress_bar() as bar, closing(ahead(function, photos)) as results:
            title = f"{what} {self.making.part}"
            yield from bar.track(results, total=len(photos), description=title)

    def set(self) -> PixelSet:
        """What training works with."""
        assert self.rows is not None  # kept or streamed
        labels = torch.tensor([self.samples[i].label for i in self.good], dtype=torch.int64)
        name = self.making.name
        known = hashlib.sha256(name.encode() + b"".join(self.digests[i] for i in self.good))
        return PixelSet(self.rows, self.aspect, labels, name, known.digest())


def _why(path: Path, error: ImageError) -> str:
    """What is wrong with a photo, without its name, which stands before it."""
    return str(error).removeprefix(f"{path}: ")
