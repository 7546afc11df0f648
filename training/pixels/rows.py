"""Sources of photos on the CPU: memory-mapped from a file of pixels, or decoded at each access.

A row is the uint8 pixels of one photo, [S, S, 3].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.errors import BrokenImage, ImageError, WorkError
from serving.imaging.decode import Decoded, decode, read_bytes
from serving.imaging.preprocess import Pixels, Preprocess
from serving.utils.parallel import map_ordered

AHEAD: Final = 2
"""Number of batches that are read in advance."""

ToPixels = Callable[[Decoded], Pixels]
"""A function: decoded photo -> pixels, uint8 [S, S, 3]."""


class Rows(Protocol):
    """Interface of a source of photos: row i is the pixels of photo i, uint8 [S, S, 3]."""

    def __len__(self) -> int:
        """Number of photos."""
        ...

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return a copy of the selected rows, uint8 [N, S, S, 3]. index: int64 [N], or a slice."""
        ...

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """For each index (int64 [N] or slice) in `order`, yield the rows, uint8 [N, S, S, 3].

        Later batches may be read in advance.
        """
        ...


class MemmapRows:
    """Rows of a memory-mapped file. The operating system loads and evicts the memory pages."""

    def __init__(self, pixels: Pixels, rows: npt.NDArray[np.int64]) -> None:
        """Store the arguments.

        Args:
            pixels: Memory-mapped pixels, uint8 [R, S, S, 3].
            rows: Position in `pixels` of each photo, int64 [N].
        """
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
    """Rows that several threads decode at each access. Decoded pixels are not stored."""

    def __init__(
        self,
        paths: Sequence[Path],
        digests: Sequence[bytes],
        to_pixels: ToPixels,
        preprocess: Preprocess,
    ) -> None:
        """Store the arguments.

        Args:
            paths: Files of the photos.
            digests: `content_digest` of each file. If a file has changed when it is decoded, a
                WorkError is raised.
            to_pixels: Computes the pixels of a decoded image.
            preprocess: Preprocessing that `to_pixels` applies; photos are decoded for it.
        """
        self._paths, self._digests = paths, digests
        self._to_pixels, self._preprocess = to_pixels, preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return next(self.batches([index]))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """For each index (int64 [N] or slice) in `order`, yield the rows, uint8 [N, S, S, 3].

        Several threads decode later batches in advance.

        Raises:
            WorkError: A photo is missing, is unreadable or has changed; the message has its path.
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
            digest, decoded = read_photo(path, self._preprocess)
        except ImageError as error:
            raise WorkError(f"{path} can't be read any more: {error}; restore it") from error
        if digest != self._digests[photo]:
            raise WorkError(f"{path} was changed while the run read it; start the run again")
        return self._to_pixels(decoded)


def read_photo(path: Path, preprocess: Preprocess) -> tuple[bytes, Decoded]:
    """Read a photo, and return the hash of its bytes (`content_digest`) and the decoded photo.

    The file is read only once: both are computed from the same bytes.

    Raises:
        ImageError: The photo can't be read or decoded.
    """
    data = read_content(path)
    return content_digest(data), decode(data, preprocess=preprocess)


def read_content(path: Path) -> bytes:
    """Read the bytes of a photo.

    Raises:
        BrokenImage: The file can't be read.
    """
    try:
        return read_bytes(path)
    except OSError as error:
        raise BrokenImage(f"{path}: {error.strerror or error}") from error


def content_digest(data: bytes) -> bytes:
    """Return the first 16 bytes of the SHA-256 of a file's bytes: the photo's key in the cache."""
    return hashlib.sha256(data).digest()[:16]
