"""Every photo of a data set, decoded once and described: size, bytes, colour, twins, oddities."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from serving.errors import ImageError
from serving.imaging import decode as images
from serving.utils.cpu import cores
from serving.utils.progress import progress_bar
from training.data.dataset import MAX_BROKEN, Dataset
from training.data.splits import PARTS
from training.utils.console import counted

UNLABELLED: Final = "unlabelled"

LONG: Final = 3.0
"""Long side over short side above which a photo is odd: a square crop shows little of it."""
TINY: Final = 64
"""Pixels of the short side below which a photo is odd."""
HUGE: Final = 25_000_000
"""Pixels from which a photo is odd: they are decoded only to be thrown away."""
_GREY: Final = 4
_FEW: Final = 10
"""Photos of a class to train on that are few."""


@dataclass(frozen=True)
class PhotoStats:
    """One photo as it was found.

    part: of `PARTS`, or "unlabelled". label: "" where it has none. size: of the file, in bytes.
    width, height: in pixels, upright; 0 of a broken one. mode: of the file, such as RGB, L or CMYK.
    grey: no pixel has a colour, whatever the mode. digest: of the pixels, so that copies with other
    metadata are twins. error: why it can't be read, or "".
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
    error: str = ""

    @property
    def short(self) -> int:
        """Short side in pixels."""
        return min(self.width, self.height)

    @property
    def stretch(self) -> float:
        """Long side over short side, at least 1."""
        return max(self.width, self.height) / max(self.short, 1)


def survey(dataset: Dataset) -> list[PhotoStats]:
    """Look at every photo, in the order of the parts; broken ones are looks with an `error`."""
    photos = [
        (path, part, dataset.classes[label])
        for part in PARTS
        for path, label in getattr(dataset, part)
    ]
    photos += [(path, UNLABELLED, "") for path in dataset.unlabelled]
    pool = ThreadPoolExecutor(cores())
    try:
        with progress_bar() as bar:
            looks = pool.map(photo_stats, *zip(*photos, strict=True))
            return list(bar.track(looks, total=len(photos), description="looking"))
    finally:
        pool.shutdown(cancel_futures=True)


def photo_stats(path: Path, part: str, label: str) -> PhotoStats:
    """Decode one photo and describe it."""
    try:
        data = images.read_bytes(path)
    except OSError as error:
        return PhotoStats(path, part, label, 0, error=error.strerror or str(error))
    try:
        image = images.decode(data).image
    except ImageError as error:
        return PhotoStats(path, part, label, len(data), error=str(error))
    mode = Image.open(io.BytesIO(data), formats=images.FORMATS).mode
    digest = hashlib.blake2b(b"%d %d " % image.size, digest_size=16)
    digest.update(image.tobytes())
    small = np.asarray(image.resize((48, 48), Image.Resampling.BOX), np.int16)
    grey = int((small.max(axis=2) - small.min(axis=2)).max()) <= _GREY
    return PhotoStats(path, part, label, len(data), *image.size, mode, grey, digest.digest())


def duplicates(looks: Iterable[PhotoStats]) -> list[list[PhotoStats]]:
    """Groups of photos with the very same pixels, in the order of their first."""
    groups: dict[bytes, list[PhotoStats]] = {}
    for one in looks:
        if one.digest:
            groups.setdefault(one.digest, []).append(one)
    return [group for group in groups.values() if len(group) > 1]


ODD: Final[Mapping[str, Callable[[PhotoStats], bool]]] = {
    "can't be read": lambda one: bool(one.error),
    f"short side below {TINY} px": lambda one: not one.error and one.short < TINY,
    f"longer than {LONG:g} : 1": lambda one: not one.error and one.stretch > LONG,
    f"above {HUGE // 1_000_000} megapixels": lambda one: one.width * one.height > HUGE,
    "without colour": lambda one: one.grey,
    "not RGB": lambda one: not one.error and one.mode != "RGB" and not one.grey,
}
"""What makes a photo strange, by name. Grey ones are told as such, whatever their mode."""


def oddities(looks: Sequence[PhotoStats]) -> Iterator[tuple[str, list[PhotoStats]]]:
    """(what is strange, the photos), the strangest first, for everything that there is any of."""
    for name, is_odd in ODD.items():
        found = [one for one in looks if is_odd(one)]
        found.sort(key=lambda one: (one.short, -one.stretch, str(one.path)))
        if found:
            yield name, found


def hints(looks: Sequence[PhotoStats], classes: Sequence[str], size: int) -> Iterator[str]:
    """What one should know before training at `size` pixels; each a line, most urgent first."""
    groups = duplicates(looks)
    for part, other in itertools.combinations(PARTS, 2):
        leaked = sum(
            sum(one.part == other for one in group)
            for group in groups
            if any(one.part == part for one in group)
        )
        if leaked:
            yield (
                f"{counted(leaked, 'exact duplicate')} across {part} and {other}: "
                "accuracy will look better than it is"
            )
    torn = [group for group in groups if len({one.label for one in group if one.label}) > 1]
    if torn:
        pair = " and ".join(sorted({one.label for one in torn[0] if one.label})[:2])
        number = counted(len(torn), "picture")
        yield f"{number} in more than one class, as in {pair}: mend the labels"
    same = sum(
        max(sum(one.part == part for one in group) - 1, 0) for group in groups for part in PARTS
    )
    if same:
        yield f"{counted(same, 'exact duplicate')} within one part: they add nothing"
    broken = sum(bool(one.error) for one in looks)
    decoded = [one for one in looks if one.part in ("train", "valid")]
    if sum(bool(one.error) for one in decoded) > MAX_BROKEN * len(decoded):
        number = counted(broken, "photo")
        yield f"{number} can't be read; training refuses more than {MAX_BROKEN:.0%}: mend them"
    elif broken:
        yield f"{counted(broken, 'photo')} can't be read; training leaves them out"
    counts = [
        sum(one.label == name and one.part == "train" and not one.error for one in looks)
        for name in classes
    ]
    if min(counts) == 0:
        empty = classes[counts.index(0)]
        yield f"{empty} has no photo to train on that can be read: training refuses; add some"
    held = [one for one in decoded if one.part == "valid"]
    if held and all(one.error for one in held):
        yield "no photo to validate on can be read: training refuses; add some"
    few = classes[int(np.argmin(counts))]
    if max(counts) >= 3 * max(min(counts), 1):
        many = classes[int(np.argmax(counts))]
        yield (
            f"{many} has {max(counts) / max(min(counts), 1):.1f} times as many photos to train on "
            f"as {few}: look at the accuracy of each class"
        )
    small = sum(0 < count < _FEW for count in counts)
    least = f"{few} has {counted(min(counts), 'photo')} to train on"
    if small > 1:
        least = f"{small} classes have fewer than {_FEW} photos to train on, the fewest {few}"
    if 0 < min(counts) < _FEW:
        yield f"{least}: {_FEW} are few, 50 are better"
    fine = [one for one in looks if not one.error]
    small = sum(one.short < size for one in fine)
    if small > len(fine) / 2:
        yield f"{small} of {len(fine)} photos are smaller than {size} px: a smaller size may do"
    grey = sum(one.grey for one in fine)
    if 0 < grey < len(fine):
        shares = [
            np.mean([one.grey for one in fine if one.label == name] or [False]) for name in classes
        ]
        if max(shares) - min(shares) > 0.2:
            worst = classes[int(np.argmax(shares))]
            yield f"{max(shares):.0%} of {worst} are without colour: a model may learn just that"
