"""Row sources on the CPU: pixels memory-mapped from a file, or decoded on the fly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from serving.errors import BrokenImage, ImageError, WorkError
from serving.imaging.decode import decode, read_bytes
from serving.imaging.preprocess import Pixels
from serving.utils.parallel import map_ordered

AHEAD: Final = 2
"""Batches that are read ahead."""

ToPixels = Callable[[Image.Image], Pixels]
"""An upright RGB image -> uint8 [S, S, 3]."""


class Rows(Protocol):
    """The pixels of a list of photos, one row per photo, in the order of the list."""

    def __len__(self) -> int:
        """Number of photos."""
        ...

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """A copy of some rows: uint8 [N, S, S, 3]. index: int64 [N], or a slice."""
        ...

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """`self[index]` for each index in `order`; implementations may read ahead."""
        ...


class MemmapRows:
    """Rows of a memory-mapped file; the operating system reads and evicts the pages."""

    def __init__(self, pixels: Pixels, rows: npt.NDArray[np.int64]) -> None:
        """pixels: uint8 [R, S, S, 3], mapped from the file; rows: the row of each photo."""
        self._pixels, self._rows = pixels, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = self._rows[index.numpy() if isinstance(index, Tensor) else index]
        return torch.from_numpy(np.take(self._pixels, rows, axis=0))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        for index in order:
            yield self[index]


class StreamingRows:
    """Rows decoded at each access, by several threads that read ahead; nothing is stored."""

    def __init__(
        self,
        paths: Sequence[Path],
        digests: Sequence[bytes],
        to_pixels: ToPixels,
        background: tuple[int, int, int],
    ) -> None:
        """digests: `content_digest` of each photo. A photo that was changed since is an error."""
        self._paths, self._digests = paths, digests
        self._to_pixels, self._background = to_pixels, background

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return next(self.batches([index]))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """`self[index]` for each index in `order`; several threads read ahead.

        Raises:
            WorkError: A photo became unreadable, is missing or has changed; the message names it.
        """
        everything = torch.arange(len(self))
        indices = [everything[index].tolist() for index in order]
        photos = (photo for index in indices for photo in index)
        window = AHEAD * max(map(len, indices), default=0)
        with closing(map_ordered(self._decode, photos, window=window)) as rows:
            for index in indices:
                yield torch.from_numpy(np.stack([next(rows) for _ in index]))

    def _decode(self, photo: int) -> Pixels:
        path = self._paths[photo]
        try:
            digest, image = read_photo(path, self._background)
        except ImageError as error:
            raise WorkError(f"{path} can't be read any more: {error}; restore it") from error
        if digest != self._digests[photo]:
            raise WorkError(f"{path} was changed while the run read it; start the run again")
        return self._to_pixels(image)


def read_photo(path: Path, background: tuple[int, int, int]) -> tuple[bytes, Image.Image]:
    """Read a file once: its `content_digest`, and the upright image decoded from the same bytes.

    Raises:
        ImageError: The photo can't be read or decoded.
    """
    data = read_content(path)
    return content_digest(data), decode(data, background=background).image


def read_content(path: Path) -> bytes:
    """The bytes of a photo.

    Raises:
        BrokenImage: The file can't be read.
    """
    try:
        return read_bytes(path)
    except OSError as error:
        raise BrokenImage(f"{path}: {error.strerror or error}") from error


def content_digest(data: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of a photo's bytes: its key in the pixel cache."""
    return hashlib.sha256(data).digest()[:16]
