"""Compute statistics of every photo of a data set, and warnings (hints) derived from them.

The statistics are image size, file size, colour, and a hash that finds duplicates.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from serving.errors import ImageError
from serving.imaging.decode import decode, read_bytes
from serving.imaging.preprocess import Pixels
from serving.utils.cpu import cores
from serving.utils.progress import progress_bar
from training.data.dataset import MAX_UNREADABLE_SHARE, Dataset
from training.data.splits import PARTS
from training.evaluation.shortcomings import unmeasured
from training.utils.console import pluralize

UNLABELLED: Final = "unlabelled"

LONG: Final = 3.0
"""Long side over short side above which a photo is unusual, as a square crop shows little of it."""
_MANY: Final = 0.05
"""Share of long photos above which they get a hint."""
TINY: Final = 64
"""Short side in pixels below which a photo is unusual."""
HUGE: Final = 25_000_000
"""Number of pixels above which a photo is unusual; training decodes all of them and uses few."""
_GREY: Final = 4
"""Largest difference between the channels of a grey pixel, 0..255."""
_FEW: Final = 10
"""A class with fewer training photos gets a hint."""
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
        digest: Hash of the decoded pixels; it does not depend on metadata.
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


def scan_photos(dataset: Dataset) -> list[PhotoStats]:
    """Read every photo, and return statistics in the order train, valid, test, unlabelled.

    The statistics of a photo that can't be read have an `error`.
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
            photos = pool.map(photo_stats, *zip(*files, strict=True))
            return list(bar.track(photos, total=len(files), description="reading"))
    finally:
        pool.shutdown(cancel_futures=True)


def photo_stats(path: Path, part: str, label: str) -> PhotoStats:
    """Decode one photo and compute its statistics."""
    try:
        data = read_bytes(path)
    except OSError as error:
        return PhotoStats(path, part, label, 0, error=error.strerror or str(error))
    try:
        decoded = decode(data)
    except ImageError as error:
        return PhotoStats(path, part, label, len(data), error=str(error))
    image, mode = decoded.image, decoded.mode
    digest = hashlib.blake2b(b"%d %d " % image.size, digest_size=16)
    digest.update(image.tobytes())
    small = np.asarray(image.resize((48, 48), Image.Resampling.BOX), np.int16)
    grey = int((small.max(axis=2) - small.min(axis=2)).max()) <= _GREY
    thumbnail = small.reshape(16, 3, 16, 3, 3).mean(axis=(1, 3)).astype(np.uint8)
    hashed = digest.digest()
    return PhotoStats(path, part, label, len(data), *image.size, mode, grey, hashed, thumbnail)


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


@dataclass(frozen=True)
class Scan:
    """The photos of a data set, and figures about them that are used by several hints.

    Attributes:
        photos: Statistics of all photos.
        classes: Names of the classes.
        size: Side of the images that training will use, in pixels.
        crop: Side of validation's centre square divided by the short side of the photo.
    """

    photos: Sequence[PhotoStats]
    classes: Sequence[str]
    size: int
    crop: float

    @cached_property
    def groups(self) -> list[list[PhotoStats]]:
        """Groups of photos with identical pixels."""
        return duplicates(self.photos)

    @cached_property
    def readable(self) -> list[PhotoStats]:
        return [photo for photo in self.photos if not photo.error]

    @cached_property
    def used(self) -> list[PhotoStats]:
        """The photos that training reads: those of the splits train and valid."""
        return [photo for photo in self.photos if photo.part in ("train", "valid")]

    @cached_property
    def counts(self) -> list[int]:
        """Number of readable training photos of each class."""
        counts = Counter(photo.label for photo in self.readable if photo.part == "train")
        return [counts[name] for name in self.classes]

    @property
    def smallest(self) -> str:
        """Name of the class with the fewest readable training photos."""
        return self.classes[int(np.argmin(self.counts))]


def hints(
    photos: Sequence[PhotoStats], classes: Sequence[str], size: int, crop: float = 0.875
) -> Iterator[str]:
    """Yield a line for each problem of the data set, most urgent first.

    Args:
        photos: Statistics of all photos.
        classes: Names of the classes.
        size: Side of the images that training will use, in pixels.
        crop: Side of validation's centre square divided by the short side of the photo.
    """
    scan = Scan(photos, classes, size, crop)
    for hint in HINTS:
        yield from hint(scan)


def _duplicates_across_parts(scan: Scan) -> Iterator[str]:
    for part, other in itertools.combinations(PARTS, 2):
        leaked = sum(
            sum(photo.part == other for photo in group)
            for group in scan.groups
            if any(photo.part == part for photo in group)
        )
        if leaked:
            yield (
                f"{pluralize(leaked, 'exact duplicate')} across {part} and {other}: "
                "accuracy will look better than it is"
            )


def _duplicates_across_classes(scan: Scan) -> Iterator[str]:
    labels = [{photo.label for photo in group if photo.label} for group in scan.groups]
    several = [names for names in labels if len(names) > 1]
    if several:
        pair = " and ".join(sorted(several[0])[:2])
        number = pluralize(len(several), "picture")
        yield f"{number} in more than one class, as in {pair}: correct the labels"


def _duplicates_within_a_part(scan: Scan) -> Iterator[str]:
    redundant = sum(
        max(sum(photo.part == part for photo in group) - 1, 0)
        for group in scan.groups
        for part in PARTS
    )
    if redundant:
        yield f"{pluralize(redundant, 'exact duplicate')} within one part: they add nothing"


def _unreadable(scan: Scan) -> Iterator[str]:
    unreadable = len(scan.photos) - len(scan.readable)
    number = pluralize(unreadable, "photo")
    if sum(bool(photo.error) for photo in scan.used) > MAX_UNREADABLE_SHARE * len(scan.used):
        yield (
            f"{number} can't be read; training refuses more than {MAX_UNREADABLE_SHARE:.0%}: "
            "repair or remove them"
        )
    elif unreadable:
        yield f"{number} can't be read; training leaves them out"


def _too_few_classes(scan: Scan) -> Iterator[str]:
    if len(scan.classes) < 2:
        have = f"one class, {scan.classes[0]}" if scan.classes else "no class"
        yield f"there is {have}: training refuses; it needs at least 2"


def _empty_class(scan: Scan) -> Iterator[str]:
    if min(scan.counts, default=1) == 0:
        yield (
            f"{scan.smallest} has no photo to train on that can be read: training refuses; add some"
        )


def _single_photo(scan: Scan) -> Iterator[str]:
    counts = Counter(photo.label for photo in scan.used)
    single = [name for name in scan.classes if counts[name] == 1]
    if single:
        several = f"{len(single)} classes have one photo, such as {single[0]}"
        have = several if len(single) > 1 else f"{single[0]} has one photo"
        yield (
            f"{have}: training refuses, unless parts are given; it needs one to train on and one "
            "to validate on"
        )


def _empty_validation(scan: Scan) -> Iterator[str]:
    if scan.classes and not any(p.part == "valid" and not p.error for p in scan.used):
        yield "there is no photo to validate on that can be read: training refuses; add some"


def _no_validation(scan: Scan) -> Iterator[str]:
    counts = Counter(p.label for p in scan.used if p.part == "valid" and not p.error)
    if counts:  # else see `_empty_validation`
        yield from unmeasured(scan.classes, np.array([counts[name] for name in scan.classes]))


def _imbalance(scan: Scan) -> Iterator[str]:
    least, most = max(min(scan.counts, default=1), 1), max(scan.counts, default=1)
    if most >= 3 * least:
        largest = scan.classes[int(np.argmax(scan.counts))]
        yield (
            f"{largest} has {most / least:.1f} times as many photos to train on as "
            f"{scan.smallest}: look at the accuracy of each class"
        )


def _few_photos(scan: Scan) -> Iterator[str]:
    if not 0 < min(scan.counts, default=0) < _FEW:
        return
    small = sum(0 < count < _FEW for count in scan.counts)
    text = f"{scan.smallest} has {pluralize(min(scan.counts), 'photo')} to train on"
    if small > 1:
        text = f"{small} classes have fewer than {_FEW} photos to train on, the fewest "
        text += scan.smallest
    yield f"{text}: {_FEW} are few, 50 are better"


def _little_seen(scan: Scan) -> Iterator[str]:
    long = [photo for photo in scan.readable if photo.stretch > LONG]
    if len(long) > _MANY * len(scan.readable):
        seen = scan.crop / float(np.median([photo.stretch for photo in long]))
        yield (
            f"{pluralize(len(long), 'photo')} longer than {LONG:g} : 1: validation and service see "
            f"the middle {seen:.0%} of the length; cut out the subject, or the answer may depend "
            "on the background"
        )


def _small_photos(scan: Scan) -> Iterator[str]:
    small = sum(photo.short < scan.size for photo in scan.readable)
    if small > len(scan.readable) / 2:
        yield (
            f"{small} of {len(scan.readable)} photos are smaller than {scan.size} px: "
            "a smaller size may do"
        )


def _colour_differs(scan: Scan) -> Iterator[str]:
    grey = sum(photo.grey for photo in scan.readable)
    if not 0 < grey < len(scan.readable):
        return
    shares = [
        np.mean([photo.grey for photo in scan.readable if photo.label == name] or [False])
        for name in scan.classes
    ]
    if max(shares, default=0) - min(shares, default=0) > 0.2:
        name = scan.classes[int(np.argmax(shares))]
        yield (
            f"{max(shares):.0%} of {name} are without colour: a model may learn that instead of "
            "the subject"
        )


HINTS: Final[Sequence[Callable[[Scan], Iterator[str]]]] = (
    _duplicates_across_parts,
    _duplicates_across_classes,
    _duplicates_within_a_part,
    _unreadable,
    _too_few_classes,
    _empty_class,
    _single_photo,
    _empty_validation,
    _no_validation,
    _imbalance,
    _few_photos,
    _little_seen,
    _small_photos,
    _colour_differs,
)
"""All hints, in the order in which they are printed."""
