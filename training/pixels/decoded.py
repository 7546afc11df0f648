"""Photos are decoded once: encoded files -> rows of uint8 that every later run finds again.

Training photos are kept whole, squeezed to a square `presize` times the training size, with their
aspect ratio beside them; augmentation undoes the squeeze when it cuts ("presizing"). Validation
photos go through the service's own preprocessing and are final.

Rows are kept by the content of a photo, which every run reads, and by all that decides its pixels;
so they are never stale. Photos that are too many for the budget are decoded as they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from serving.errors import DataError, WorkError
from serving.imaging.preprocess import Preprocess
from training.data.dataset import MAX_BROKEN, Dataset
from training.pixels.part import PixelPart, PixelSet
from training.pixels.rows import StreamingRows
from training.pixels.transform import PixelTransform
from training.utils import disk_cache

__all__ = ["Photos", "PixelSet", "decode"]


class Photos:
    """The decoded photos of a data set, at one image size at a time.

    dataset: without the photos that turned out to be unreadable.
    """

    def __init__(
        self,
        dataset: Dataset,
        presize: float,
        log: Callable[[str], None],
        cache_gb: float | None = None,
    ) -> None:
        """Nothing is decoded yet; all as `decode`. A wrong `cache_gb` is refused here."""
        disk_cache.wanted(cache_gb)
        self.dataset, self._presize, self._say, self._cache_gb = dataset, presize, log, cache_gb
        self._preprocess: Preprocess | None = None
        self._sets: tuple[PixelSet, PixelSet] | None = None

    def at(self, preprocess: Preprocess) -> tuple[PixelSet, PixelSet]:
        """The training and the validation part; errors as `decode`."""
        if self._sets is None or preprocess != self._preprocess:
            self._sets = None  # the old ones go first: both would take twice the room
            before = self.dataset
            self.dataset, *sets = decode(
                before, preprocess, self._presize, self._say, self._cache_gb
            )
            if self._preprocess is not None and self.dataset is not before:
                raise WorkError("photos that could be read at first can't be any more: mend them")
            self._preprocess, self._sets = preprocess, (sets[0], sets[1])
        return self._sets


def decode(
    dataset: Dataset,
    preprocess: Preprocess,
    presize: float,
    log: Callable[[str], None],
    cache_gb: float | None = None,
) -> tuple[Dataset, PixelSet, PixelSet]:
    """Decode the training and the validation part, or find them decoded.

    Unreadable photos are named, counted and left out of the data set that comes back. A part that
    is larger than what is left of the budget is not kept: its photos are decoded when needed.

    Args:
        dataset: What to decode.
        preprocess: Decides the pixels.
        presize: Side of the training photos, in image sizes.
        say: Takes lines for a person.
        cache_gb: Budget of the cache, in GB; as `cache.wanted`.

    Raises:
        DataError: More than 5 % of the photos are unreadable, or too few are left.
        OptionError: As `cache.wanted`.
        WorkError: The disk is full.
    """
    room = disk_cache.open_cache(cache_gb)
    started = time.perf_counter()
    parts = (
        PixelPart(dataset.train, PixelTransform("train", preprocess, presize), log),
        PixelPart(dataset.valid, PixelTransform("valid", preprocess, presize), log),
    )
    names = {part.making.name for part in parts}
    left, refused = room.budget, False
    for part in parts:
        part.scan()
        if part.size <= left and part.size:
            try:
                part.keep(room, names)
            except OSError as error:
                if not refused:
                    why = f"can't be used: {error.strerror or error}"
                    where = f"the cache {disk_cache.shown(room.folder)}"
                    log(f"warning: {where} {why}; decoded photos go to a temporary file")
                refused = True
                part.keep_aside()
            left -= part.size
        if part.rows is None:
            part.stream()
    log(_told(parts, None if refused else room, time.perf_counter() - started))
    broken = {path: reason for part in parts for path, reason in part.broken.items()}
    if broken:
        for path, reason in broken.items():
            log(f"skipped {path}: {reason}")
        total = len(dataset.train) + len(dataset.valid)
        worst = f"{len(broken)} of {total} photos can't be read, as {next(iter(broken))}"
        if len(broken) > MAX_BROKEN * total:
            raise DataError(f"{worst}: more than {MAX_BROKEN:.0%}; mend or remove them")
        log(f"warning: {worst}; going on without them")
        dataset = dataset.without(broken)
    return dataset, parts[0].set(), parts[1].set()


def _told(parts: Sequence[PixelPart], room: disk_cache.DiskCache | None, seconds: float) -> str:
    """What was done, in a line; `room` where rows can be kept."""
    photos, fresh = sum(len(part.good) for part in parts), sum(part.fresh for part in parts)
    streamed = [part for part in parts if isinstance(part.rows, StreamingRows)]
    stream = sum(len(part.good) for part in streamed)
    words = [f"{photos:,} photos"]
    if photos > stream + fresh:
        words.append(f"{photos - stream - fresh:,} from the cache")
    words.append(f"{fresh:,} decoded in {seconds:.1f} s" if fresh else f"read in {seconds:.1f} s")
    if streamed:
        size = disk_cache.gigabytes(sum(part.size for part in streamed))
        words.append(f"{stream:,} streamed: their {size} are more than --cache-gb allows")
    where = ""
    if room and room.budget:
        have = f"{disk_cache.gigabytes(room.size())} of {disk_cache.gigabytes(room.budget)}"
        where = f"; {have} in {disk_cache.shown(room.folder)}"
    return f"pixels: {', '.join(words)}{where}"
