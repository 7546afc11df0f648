"""Rows of pixels, however they are had: cut from a file, or decoded whenever they are needed."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from serving.errors import BrokenImage, ImageError, WorkError
from serving.imaging import decode as images
from serving.imaging.preprocess import Pixels
from serving.utils.cpu import cores

AHEAD: Final = 2
"""Batches that are decoded ahead."""

Make = Callable[[Image.Image], Pixels]
"""An upright picture -> uint8 [S, S, 3]."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Rows(Protocol):
    """The pixels of photos, in the order of a part's photos."""

    def __len__(self) -> int:
        """How many photos."""
        ...

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Some of them: uint8 [N, S, S, 3], the caller's own. index: int64 [N], or a slice."""
        ...

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """`self[index]` for every index of `order`, known beforehand so that it can be prepared."""
        ...


class MemmapRows:
    """Rows of a file, which the system reads as they are asked for and may forget again."""

    def __init__(self, pixels: Pixels, rows: npt.NDArray[np.int64]) -> None:
        """pixels: uint8 [R, S, S, 3], a view of the file; rows: where each photo lies in it."""
        self._pixels, self._rows = pixels, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = self._rows[index.numpy() if isinstance(index, Tensor) else index]
        return torch.from_numpy(np.take(self._pixels, rows, axis=0))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """As `Rows`."""
        for index in order:
            yield self[index]


class StreamingRows:
    """Rows that are decoded each time, in parallel and ahead; nothing is kept."""

    def __init__(
        self,
        paths: Sequence[Path],
        digests: Sequence[bytes],
        make: Make,
        background: tuple[int, int, int],
    ) -> None:
        """digests: of the photos as they were found; one that is another by now is an error."""
        self._paths, self._digests = paths, digests
        self._make, self._background = make, background

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return next(self.batches([index]))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """As `Rows`.

        Raises:
            WorkError: A photo is broken, gone or another by now; names it.
        """
        everything = torch.arange(len(self))
        indices = [everything[index].tolist() for index in order]
        photos = (photo for index in indices for photo in index)
        window = AHEAD * max(map(len, indices), default=0)
        with closing(ahead(self._one, photos, window)) as rows:
            for index in indices:
                yield torch.from_numpy(np.stack([next(rows) for _ in index]))

    def _one(self, photo: int) -> Pixels:
        path = self._paths[photo]
        try:
            digest, image = read(path, self._background)
        except ImageError as error:
            raise WorkError(f"{path} can't be read any more: {error}; mend it") from error
        if digest != self._digests[photo]:
            raise WorkError(f"{path} was changed while the run read it; start the run again")
        return self._make(image)


def read(path: Path, background: tuple[int, int, int]) -> tuple[bytes, Image.Image]:
    """A photo's `digest_of` and its upright picture, both of the same bytes.

    Raises:
        ImageError: As `images.read`.
    """
    data = content(path)
    return digest_of(data), images.decode(data, background=background).image


def content(path: Path) -> bytes:
    """The bytes of a photo.

    Raises:
        BrokenImage: It can't be read.
    """
    try:
        return images.read_bytes(path)
    except OSError as error:
        raise BrokenImage(f"{path}: {error.strerror or error}") from error


def digest_of(data: bytes) -> bytes:
    """Sixteen bytes that no two photos share: half of their sha256."""
    return hashlib.sha256(data).digest()[:16]


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], window: int = 0
) -> Generator[Result, None, None]:
    """`function` of every item, in order, on all cores; the first error ends it.

    window: results that may wait to be fetched, so that memory stays small; at least two a core.
    """
    workers = cores()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > max(window, 2 * workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
