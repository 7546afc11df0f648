"""Derive hints from the statistics of the photos of a data set: one line for each problem."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from serving.imaging.preprocess import Preprocess
from training.data.dataset import MAX_UNREADABLE_SHARE
from training.data.splits import PARTS
from training.evaluation.shortcomings import unmeasured
from training.preview.scan import PhotoStats, duplicates
from training.utils.console import pluralize

_FEW: Final = 10
"""A class with fewer training photos gets a hint."""
_MANY: Final = 0.1
"""Share of photos that lose much to the centre crop above which there is a hint."""


@dataclass(frozen=True)
class Scan:
    """The photos of a data set, and figures about them that are used by several hints.

    Attributes:
        photos: Statistics of all photos.
        classes: Names of the classes.
        preprocess: Preprocessing that training will use.
        command: Command that trains on the photos, to which options can be added.
    """

    photos: Sequence[PhotoStats]
    classes: Sequence[str]
    preprocess: Preprocess
    command: str

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
    photos: Sequence[PhotoStats],
    classes: Sequence[str],
    preprocess: Preprocess,
    command: str = "fledge train quick --data DATA",
) -> Iterator[str]:
    """Yield a line for each problem of the data set, most urgent first.

    Args:
        photos: Statistics of all photos.
        classes: Names of the classes.
        preprocess: Preprocessing that training will use.
        command: Command that trains on the photos, to which options can be added.
    """
    scan = Scan(photos, classes, preprocess, command)
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


def _cut_off(scan: Scan) -> Iterator[str]:
    if scan.preprocess.fit != "crop":
        return
    lost = [photo.cut_off for photo in scan.readable if _loses_over_a_third(photo)]
    if len(lost) > _MANY * len(scan.readable):
        yield (
            f"{len(lost)} of {len(scan.readable)} photos lose over a third of their area to the "
            f"centre crop, {float(np.median(lost)):.0%} in the median: validation and service do "
            f"not see it. See them in photos.png; `{scan.command} preprocess.fit=pad` and "
            "preprocess.fit=squish train on whole photos"
        )


def _loses_over_a_third(photo: PhotoStats) -> bool:
    """Whether over a third of the area is outside of the largest centre square.

    The short side may have been rounded: a photo of 500 x 333 is one of 3 : 2, and loses a third.
    """
    return 3 * (photo.short + 0.5) < 2 * max(photo.width, photo.height)


def _small_photos(scan: Scan) -> Iterator[str]:
    small = sum(photo.short < scan.preprocess.size for photo in scan.readable)
    if small > len(scan.readable) / 2:
        yield (
            f"{small} of {len(scan.readable)} photos are smaller than {scan.preprocess.size} px: "
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
    _cut_off,
    _small_photos,
    _colour_differs,
)
"""All hints, in the order in which they are printed."""
