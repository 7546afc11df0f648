"""Compute statistics of every photo of a data set.

The statistics are image size, file size, colour, and a hash that finds duplicates. Large photos are
decoded at a reduced size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from serving.errors import ImageError
from serving.imaging.decode import FULL, decode, read, read_bytes
from serving.imaging.preprocess import Pixels, Preprocess
from serving.utils.cpu import cores
from serving.utils.progress import progress_bar
from training.data.dataset import Dataset
from training.data.splits import PARTS

UNLABELLED: Final = "unlabelled"

LONG: Final = 3.0
"""Long side over short side above which a photo is unusual, as a square crop shows little of it."""
TINY: Final = 64
"""Short side in pixels below which a photo is unusual."""
HUGE: Final = 25_000_000
"""Number of pixels above which a photo is unusual; training uses few of them."""
_GREY: Final = 4
"""Largest difference between the channels of a grey pixel, 0..255."""
_REDUCED: Final = Preprocess(decode="scaled", fit="squish")
"""How photos are decoded: those of 12 megapixels at a quarter of their width and height."""
_ALIKE: Final = 4
"""Largest difference, 0..255, of the thumbnails of two files with the same picture: JPEGs and other
files are reduced in different ways."""
_ALIKE_MEAN: Final = 0.5
"""The same, of the thumbnails' means."""
_NOTHING: Final = np.zeros((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class PhotoStats:
    """Statistics of one photo.

    Attributes:
        path: Path of the image file.
        part: The photo's split: "train", "valid" or "test"; or "unlabelled".
        label: Name of the photo's class, or "".
        size: Size of the file in bytes.
        width: Width in pixels, after applying the EXIF orientation; 0 if the photo can't be read.
        height: Height in pixels, after applying the EXIF orientation; 0 if the photo can't be read.
        mode: Pillow's mode of the file, such as RGB, L or CMYK.
        grey: Whether all pixels are grey, in any mode.
        digest: Hash of the decoded pixels, which may be of reduced size; it does not depend on
            metadata. After `scan_photos`, equal digests mean equal pixels at full size.
        thumbnail: The photo, stretched to a square: uint8 [16, 16, 3]; empty if it can't be read.
        error: Why the photo can't be read, or "".
    """

    path: Path
    part: str
    label: str
    size: int
    width: int = 0
    height: int = 0
    mode: str = ""
    grey: bool = False
    digest: bytes = b""
    thumbnail: Pixels = field(default_factory=lambda: _NOTHING, repr=False, compare=False)
    error: str = ""

    @property
    def short(self) -> int:
        """Short side in pixels."""
        return min(self.width, self.height)

    @property
    def stretch(self) -> float:
        """Ratio of the long side to the short side, at least 1."""
        return max(self.width, self.height) / max(self.short, 1)

    @property
    def cut_off(self) -> float:
        """Share of the area that is outside of the largest centre square."""
        return 1 - self.short / max(self.width, self.height, 1)


def scan_photos(dataset: Dataset) -> list[PhotoStats]:
    """Read every photo, and return statistics in the order train, valid, test, unlabelled.

    The statistics of a photo that can't be read have an `error`. Large photos are decoded at a
    reduced size, and those of them that may be duplicates at full size, too.
    """
    labelled = [
        (path, part, dataset.classes[label])
        for part in PARTS
        for path, label in getattr(dataset, part)
    ]
    files = labelled + [(path, UNLABELLED, "") for path in dataset.unlabelled]
    pool = ThreadPoolExecutor(cores())
    try:
        with progress_bar() as bar:
            found = pool.map(photo_stats, *zip(*files, strict=True))
            photos = list(bar.track(found, total=len(files), description="reading"))
            alike = look_alike(photos)
            if not alike:
                return photos
            digests = pool.map(lambda index: _full_digest(photos[index]), alike)
            compared = bar.track(digests, total=len(alike), description="comparing")
            for index, digest in zip(alike, compared, strict=True):
                photos[index] = replace(photos[index], digest=digest)
            return photos
    finally:
        pool.shutdown(cancel_futures=True)


def photo_stats(path: Path, part: str, label: str) -> PhotoStats:
    """Decode one photo, a large one at a reduced size, and compute its statistics."""
    try:
        data = read_bytes(path)
    except OSError as error:
        return PhotoStats(path, part, label, 0, error=error.strerror or str(error))
    try:
        decoded = decode(data, preprocess=_REDUCED)
    except ImageError as error:
        return PhotoStats(path, part, label, len(data), error=str(error))
    image = decoded.image
    box = Image.Resampling.BOX
    small = np.asarray(image.resize((48, 48), box, box=decoded.area), np.int16)
    grey = int((small.max(axis=2) - small.min(axis=2)).max()) <= _GREY
    thumbnail = small.reshape(16, 3, 16, 3, 3).mean(axis=(1, 3)).astype(np.uint8)
    return PhotoStats(
        path,
        part,
        label,
        len(data),
        *decoded.size,
        decoded.mode,
        grey,
        _digest(image, decoded.size),
        thumbnail,
    )


def look_alike(photos: Sequence[PhotoStats]) -> list[int]:
    """Return the indices of the reduced photos that may have the pixels of another photo.

    They are those of the same size with almost the same thumbnail.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, photo in enumerate(photos):
        if photo.digest and _REDUCED.reduction(photo.width, photo.height) > 1:
            by_size.setdefault((photo.width, photo.height), []).append(i)
    found: list[int] = []
    for own in by_size.values():
        order = sorted(own, key=lambda i: photos[i].thumbnail.mean())
        means = np.array([photos[i].thumbnail.mean() for i in order])
        ends = np.searchsorted(means, means + _ALIKE_MEAN, side="right")
        thumbnails = np.stack([photos[i].thumbnail for i in order]).astype(np.int16)
        alike = np.zeros(len(order), bool)
        for i, end in enumerate(ends):
            later = np.arange(i + 1, end)
            if alike[i]:  # only new ones matter; else thousands of equal photos would take long
                later = later[~alike[later]]
            difference = np.abs(thumbnails[later] - thumbnails[i]).max(axis=(1, 2, 3))
            near = later[difference <= _ALIKE]
            alike[near] = True
            alike[i] |= near.size > 0
        found += [order[i] for i in np.flatnonzero(alike)]
    return sorted(found)


def _full_digest(photo: PhotoStats) -> bytes:
    """Return the hash of a photo's pixels at full size; b"" if it can't be read again."""
    try:
        image = read(photo.path, preprocess=FULL).image
    except ImageError:  # changed since it was decoded at a reduced size
        return b""
    return _digest(image, image.size)


def _digest(image: Image.Image, size: tuple[int, int]) -> bytes:
    hashed = hashlib.blake2b(b"%d %d " % size, digest_size=16)
    hashed.update(image.tobytes())
    return hashed.digest()


def duplicates(photos: Iterable[PhotoStats]) -> list[list[PhotoStats]]:
    """Return groups of photos with identical pixels, ordered by the first photo of each group."""
    groups: dict[bytes, list[PhotoStats]] = {}
    for photo in photos:
        if photo.digest:
            groups.setdefault(photo.digest, []).append(photo)
    return [group for group in groups.values() if len(group) > 1]


UNUSUAL: Final[Mapping[str, Callable[[PhotoStats], bool]]] = {
    "can't be read": lambda photo: bool(photo.error),
    f"short side below {TINY} px": lambda photo: not photo.error and photo.short < TINY,
    f"longer than {LONG:g} : 1": lambda photo: not photo.error and photo.stretch > LONG,
    f"above {HUGE // 1_000_000} megapixels": lambda photo: photo.width * photo.height > HUGE,
    "without colour": lambda photo: photo.grey,
    "not RGB": lambda photo: not photo.error and photo.mode != "RGB" and not photo.grey,
}
"""Kinds of unusual photos. A grey photo counts only as "without colour", in any mode."""


def unusual_photos(photos: Sequence[PhotoStats]) -> Iterator[tuple[str, list[PhotoStats]]]:
    """Yield the name and the photos of each kind of unusual photo in `UNUSUAL`.

    The photos of a kind are in ascending order of their short sides. Kinds without photos are left
    out.
    """
    for name, is_unusual in UNUSUAL.items():
        found = [photo for photo in photos if is_unusual(photo)]
        found.sort(key=lambda photo: (photo.short, -photo.stretch, str(photo.path)))
        if found:
            yield name, found
