"""Decode the photos of a dataset once, and store the uint8 pixels in the disk cache.

Training photos are resized to squares ("presizing"). The side of a square is `presize` times the
side of the training images. The aspect ratios of the photos are stored beside the pixels.
Augmentation restores these ratios when it crops. Validation photos go through the same
preprocessing as in serving.

The cache key of a photo is a hash of the file's bytes and of everything else that determines the
pixels. A changed photo therefore gets a new key and is decoded again. If the photos of a split
(train or valid) exceed the size limit of the cache, they are decoded at each access.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from serving.errors import DataError, WorkError
from serving.imaging.preprocess import Preprocess
from training.data.dataset import MAX_UNREADABLE_SHARE, Dataset
from training.pixels.part import PixelPart, PixelSet
from training.pixels.rows import StreamingRows
from training.pixels.transform import PixelTransform
from training.utils import disk_cache
from training.utils.console import Log, quoted

__all__ = ["DecodedPhotos", "PixelSet", "decode_dataset"]


class DecodedPhotos:
    """The decoded photos of a dataset, for one `Preprocess` at a time.

    dataset: The dataset. After decoding, it no longer contains unreadable photos.
    """

    def __init__(
        self, dataset: Dataset, presize: float, log: Log, cache_gb: float | None = None
    ) -> None:
        """Store the arguments for `decode_dataset`. Nothing is decoded yet.

        Raises:
            OptionError: `cache_gb` is negative or not a number.
        """
        disk_cache.budget_gb(cache_gb)
        self.dataset, self._presize, self._log, self._cache_gb = dataset, presize, log, cache_gb
        self._preprocess: Preprocess | None = None
        self._sets: tuple[PixelSet, PixelSet] | None = None

    def pixel_sets(self, preprocess: Preprocess) -> tuple[PixelSet, PixelSet]:
        """Return the decoded training photos and the decoded validation photos.

        Raises:
            DataError: More than 5 % of the photos are unreadable, or too few are left.
            WorkError: The disk is full, or photos became unreadable since the first call.
        """
        if self._sets is None or preprocess != self._preprocess:
            self._sets = None  # first release the old pixels: both take twice the memory
            before = self.dataset
            self.dataset, *sets = decode_dataset(
                before, preprocess, self._presize, self._log, self._cache_gb
            )
            if self._preprocess is not None and self.dataset is not before:
                raise WorkError("photos became unreadable during the run: restore them")
            self._preprocess, self._sets = preprocess, (sets[0], sets[1])
        return self._sets


def decode_dataset(
    dataset: Dataset,
    preprocess: Preprocess,
    presize: float,
    log: Log,
    cache_gb: float | None = None,
) -> tuple[Dataset, PixelSet, PixelSet]:
    """Decode the training and validation photos, or take their pixels from the cache.

    Unreadable photos are logged and removed from the returned dataset. If the photos of a split
    (train or valid) exceed the remaining space in the cache, they are decoded at each access.

    Args:
        dataset: Photos to decode.
        preprocess: Preprocessing of the model; determines the pixels.
        presize: Side of the training squares as a multiple of the model's image size.
        log: Function that writes a log line.
        cache_gb: Size limit of the cache in GB; None: the default of `disk_cache.budget_gb`.

    Returns:
        The dataset, the training photos and the validation photos, all without unreadable photos.

    Raises:
        DataError: More than 5 % of the photos are unreadable, or too few are left.
        OptionError: `cache_gb` is negative or not a number.
        WorkError: The disk is full.
    """
    cache = disk_cache.open_cache(cache_gb)
    started = time.perf_counter()
    parts = (
        PixelPart(dataset.train, PixelTransform("train", preprocess, presize), log),
        PixelPart(dataset.valid, PixelTransform("valid", preprocess, presize), log),
    )
    names = {part.transform.name for part in parts}
    budget_left, cache_failed = cache.budget, False
    for part in parts:
        part.read_digests()
        if part.size <= budget_left and part.size:
            try:
                part.store_in_cache(cache, names)
            except OSError as error:
                if not cache_failed:
                    why = f"can't be used: {error.strerror or error}"
                    where = f"the cache {disk_cache.abbreviate_home(cache.folder)}"
                    log(f"warning: {where} {why}; decoded photos go to a temporary file")
                cache_failed = True
                part.store_in_temporary_file()
            budget_left -= part.size
        if part.rows is None:
            part.stream()
    seconds = time.perf_counter() - started
    if copies := _copies(dataset.root, *parts):
        log(f"warning: {copies}")
    log(_summary(parts, None if cache_failed else cache, seconds))
    unreadable = {path: reason for part in parts for path, reason in part.unreadable.items()}
    if unreadable:
        for path, reason in unreadable.items():
            log(f"skipped {path}: {reason}")
        total = len(dataset.train) + len(dataset.valid)
        reason, _ = Counter(unreadable.values()).most_common(1)[0]
        example = next(path for path, found in unreadable.items() if found == reason)
        what = f"{len(unreadable)} of {total} photos can't be read, for example {example}"
        if len(unreadable) > MAX_UNREADABLE_SHARE * total:
            raise DataError(
                f"{what}: more than {MAX_UNREADABLE_SHARE:.0%}; replace or remove them; "
                f"why: {reason}"
            )
        log(f"warning: {what}; they are left out")
        dataset = dataset.without(unreadable)
    return dataset, parts[0].pixel_set(), parts[1].pixel_set()


def _copies(root: Path, train: PixelPart, valid: PixelPart) -> str:
    """Return what to say of validation photos that are exact copies of training photos, or ""."""
    known = {train.digests[i]: train.samples[i].path for i in train.readable}
    copies = [i for i in valid.readable if valid.digests[i] in known]
    if not copies:
        return ""
    first = valid.samples[copies[0]].path, known[valid.digests[copies[0]]]
    copy, original = (quoted(os.path.relpath(path, root)) for path in first)
    are = "is an exact copy" if len(copies) == 1 else "are exact copies"
    return (
        f"{len(copies)} of {len(valid.readable)} validation photos {are} of a training photo, such "
        f"as {copy} of {original}: accuracy will look better than it is; fledge preview lists them"
    )


def _summary(parts: Sequence[PixelPart], cache: disk_cache.DiskCache | None, seconds: float) -> str:
    """Return the log line with the numbers of cached, decoded and streamed photos.

    Streamed photos are decoded at each access. `cache` is the disk cache, or None if it can't be
    used.
    """
    photos, decoded = sum(len(p.readable) for p in parts), sum(p.decoded for p in parts)
    streamed_parts = [part for part in parts if isinstance(part.rows, StreamingRows)]
    streamed = sum(len(part.readable) for part in streamed_parts)
    words = [f"{photos:,} photos"]
    if photos > streamed + decoded:
        words.append(f"{photos - streamed - decoded:,} from the cache")
    words.append(
        f"{decoded:,} decoded in {seconds:.1f} s" if decoded else f"read in {seconds:.1f} s"
    )
    if streamed_parts:
        size = disk_cache.format_size(sum(part.size for part in streamed_parts))
        words.append(f"{streamed:,} streamed: their {size} are more than --cache-gb allows")
    where = ""
    if cache and cache.budget:
        used = disk_cache.format_size(cache.size())
        limit = disk_cache.format_size(cache.budget)
        where = f"; {used} of {limit} in {disk_cache.abbreviate_home(cache.folder)}"
    return f"pixels: {', '.join(words)}{where}"
