"""Find validation photos that are nearly the same as a training photo: frames of one video."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Final

import numpy as np
import numpy.typing as npt

from serving.terminal import quote
from training.data.grouped_splits import FOLDER, group_names
from training.preview.scan import PhotoStats

MAX_DIFFERENCE: Final = 6.0
"""Largest root mean square difference of two near copies, in pixel values of 0 to 255."""
MAX_RELATIVE: Final = 0.15
"""The same, relative to the standard deviation of the pixels, which is small for pale photos."""

MAX_PHOTOS: Final = 2_000
MAX_TRAINING: Final = 20_000
"""Photos of each kind that are compared, evenly spaced: some seconds at most."""
_CHUNK: Final = 250
_TOLD: Final = 0.02
"""Share of the photos of a part from which near copies are told."""


_TOGETHER: Final = 0.8
"""Share of the pairs that a way of grouping must keep together to be proposed."""
_GROUPS: Final = 5
"""Number of groups that each class must have then."""
_SPLIT: Final = "--split FILE, a table path,fold in which they have the same fold"
_LARGEST: Final = 0.25
"""Largest share of a class that a group may have then."""
_WAYS: Final = (FOLDER, r"(.*?[^0-9])[0-9]+\.", r"(.*?[^0-9])[ ._-]*[a-zA-Z]?[0-9]+\.")
"""Values of `data.group`: by folder; by the name without the number at its end."""


def hints(photos: Sequence[PhotoStats], root: Path, given: str = "") -> Iterator[str]:
    """Yield a line for each of valid and test of which many photos have a near copy in train.

    Args:
        photos: Statistics of all photos.
        root: Data folder, to which the names of files are relative.
        given: Where the parts are given; "" if valid was drawn.
    """
    readable = [photo for photo in photos if not photo.error]
    training = [photo for photo in readable if photo.part == "train"]
    for part, name in (("valid", "validation"), ("test", "test")):
        own = [photo for photo in readable if photo.part == part]
        found = near_copies(own, training)
        compared = min(len(own), MAX_PHOTOS)
        if not found or len(found) < _TOLD * compared:
            continue
        pair = " and ".join(_path(photo, root).as_posix() for photo in found[0])
        if part == "test" or given:
            source = given or "the data set"
            remedy = f"the parts are given by {source}: change them there, or give {_SPLIT}"
        else:
            remedy = f"keep them in one part with {_remedy(readable, found, root)}"
        is_or_are = "is" if len(found) == 1 else "are"
        yield (
            f"{len(found)} of {compared} {name} photos {is_or_are} nearly the same as a training "
            f"photo, such as {pair} (frames of a video, shots of a burst, copies): accuracy will "
            f"look better than it is; {remedy}"
        )


def _remedy(
    photos: Sequence[PhotoStats], found: Sequence[tuple[PhotoStats, PhotoStats]], root: Path
) -> str:
    """Return the option that keeps the pairs together, if one does and leaves enough groups."""
    paths = [_path(photo, root) for photo in photos]
    for way in _WAYS:
        groups = dict(zip(paths, group_names(paths, way), strict=True))
        same = sum(groups[_path(one, root)] == groups[_path(other, root)] for one, other in found)
        of_class: dict[str, Counter[str]] = {}
        for photo, path in zip(photos, paths, strict=True):
            of_class.setdefault(photo.label, Counter())[groups[path]] += 1
        counts = [count for label, count in of_class.items() if label or len(of_class) == 1]
        fewest = min(map(len, counts))
        largest = max(max(count.values()) / count.total() for count in counts)
        if same >= _TOGETHER * len(found) and fewest >= _GROUPS and largest <= _LARGEST:
            return quote(f"data.group={way}")
    return _SPLIT


def _path(photo: PhotoStats, root: Path) -> PurePath:
    return PurePath(os.path.relpath(photo.path, root))


def near_copies(
    photos: Sequence[PhotoStats], training: Sequence[PhotoStats]
) -> list[tuple[PhotoStats, PhotoStats]]:
    """Return the photos that are nearly the same as a training photo, each with that photo.

    The thumbnails of 16 x 16 pixels are compared. Exact duplicates are left out.

    Args:
        photos: Photos of another part than train, which can be read.
        training: Photos of the part train, which can be read.
    """
    photos, training = _evenly(photos, MAX_PHOTOS), _evenly(training, MAX_TRAINING)
    if not photos or not training:
        return []
    exact = {photo.digest for photo in training}
    others = _vectors(training)
    squares = (others**2).sum(axis=1)
    found: list[tuple[PhotoStats, PhotoStats]] = []
    for start in range(0, len(photos), _CHUNK):
        chunk = photos[start : start + _CHUNK]
        own = _vectors(chunk)
        distances = (own**2).sum(axis=1)[:, None] + squares - 2 * own @ others.T
        nearest = distances.argmin(axis=1)
        for i, photo in enumerate(chunk):
            root_mean_square = (
                max(float(distances[i, nearest[i]]), 0.0) ** 0.5 / own.shape[1] ** 0.5
            )
            limit = min(MAX_DIFFERENCE, MAX_RELATIVE * float(own[i].std()))
            if root_mean_square < limit and photo.digest not in exact:
                found.append((photo, training[nearest[i]]))
    return found


def _vectors(photos: Sequence[PhotoStats]) -> npt.NDArray[np.float32]:
    return np.stack([photo.thumbnail.reshape(-1) for photo in photos]).astype(np.float32)


def _evenly(photos: Sequence[PhotoStats], most: int) -> Sequence[PhotoStats]:
    if len(photos) <= most:
        return photos
    return [photos[i * len(photos) // most] for i in range(most)]
