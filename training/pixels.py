"""Photos are decoded once: encoded files -> one uint8 array, memory-mapped.

Training photos are kept whole, squeezed to a square a little above the training size, with their
aspect ratio beside them; augmentation undoes the squeeze when it cuts ("presizing"). Validation
photos go through the service's own preprocessing and are final.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from serving import images
from serving.errors import DataError, ImageError, WorkError
from serving.preprocess import Preprocess
from serving.progress import progress_bar
from serving.settings import cores
from training.data import MAX_BROKEN, Dataset, Sample

PRESIZE: Final = 1.25

Make = Callable[[Image.Image], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class PixelSet:
    """Decoded photos of one part of a data set.

    pixels: uint8 [N, S, S, 3]; aspect: float32 [N], width over height; labels: int64 [N].
    """

    pixels: Tensor
    aspect: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many photos."""
        return len(self.labels)


def squeeze(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """A whole photo as training keeps it: uint8 [S, S, 3], S being `PRESIZE` times the size."""
    side = round(preprocess.size * PRESIZE)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


class Photos:
    """The decoded photos of a data set, at one image size at a time.

    dataset: without the photos that turned out to be unreadable.
    """

    def __init__(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Nothing is decoded yet."""
        self.dataset, self._say = dataset, say
        self._preprocess: Preprocess | None = None
        self._sets: tuple[PixelSet, PixelSet] | None = None

    def at(self, preprocess: Preprocess) -> tuple[PixelSet, PixelSet]:
        """The training and the validation part; errors as `decode`."""
        if self._sets is None or preprocess != self._preprocess:
            self._sets = None  # the old ones go first: both would take twice the room
            before = self.dataset
            self.dataset, *sets = decode(before, preprocess, self._say)
            if self._preprocess is not None and self.dataset is not before:
                raise WorkError("photos that could be read at first can't be any more: mend them")
            self._preprocess, self._sets = preprocess, (sets[0], sets[1])
        return self._sets


def decode(
    dataset: Dataset, preprocess: Preprocess, say: Callable[[str], None]
) -> tuple[Dataset, PixelSet, PixelSet]:
    """Decode the training and the validation part.

    Unreadable photos are named, counted and left out of the data set that comes back.

    Raises:
        DataError: More than 5 % of the photos are unreadable, or too few are left.
    """
    working = round(preprocess.size * PRESIZE)

    def whole(image: Image.Image) -> npt.NDArray[np.uint8]:
        return squeeze(image, preprocess)

    train, broken = _decode(dataset.train, whole, working, preprocess, "decoding train")
    valid, more = _decode(dataset.valid, preprocess, preprocess.size, preprocess, "decoding valid")
    broken.update(more)
    if broken:
        for path, reason in broken.items():
            say(f"skipped {path}: {reason}")
        total = len(dataset.train) + len(dataset.valid)
        worst = f"{len(broken)} of {total} photos can't be read, as {next(iter(broken))}"
        if len(broken) > MAX_BROKEN * total:
            raise DataError(f"{worst}: more than {MAX_BROKEN:.0%}; mend or remove them")
        say(f"warning: {worst}; going on without them")
        dataset = dataset.without(broken)
    return dataset, train, valid


def _reserve(file: int, size: int) -> None:
    """Take the room now: a full disk under a memory map ends the process without a word."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        elif shutil.disk_usage(tempfile.gettempdir()).free < size:
            raise OSError("too little room")
    except OSError as error:
        raise WorkError(
            f"decoded photos need {size / 1e9:.1f} GB in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; free some or set TMPDIR"
        ) from error


def _decode(
    samples: Sequence[Sample], make: Make, side: int, preprocess: Preprocess, title: str
) -> tuple[PixelSet, dict[Path, str]]:
    # The file has no name: the system takes it back however this process ends.
    with tempfile.TemporaryFile(prefix="fledge-pixels-") as file:
        shape = (max(len(samples), 1), side, side, 3)
        _reserve(file.fileno(), math.prod(shape))
        array = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    aspect = np.ones(len(samples), np.float32)
    broken: dict[Path, str] = {}

    def one(index: int) -> None:
        path = samples[index].path
        try:
            image = images.read(path, background=preprocess.background).image
            array[index] = make(image)
            aspect[index] = image.width / image.height
        except ImageError as error:
            broken[path] = str(error)

    with ThreadPoolExecutor(cores()) as pool, progress_bar() as bar:
        done = pool.map(one, range(len(samples)))
        for _ in bar.track(done, total=len(samples), description=title):
            pass
    kept = np.array([i for i, s in enumerate(samples) if s.path not in broken], dtype=np.int64)
    for new, old in enumerate(kept):  # in place: a copy would bring the whole file into memory
        if new != old:
            array[new] = array[old]
    pixels = array[: len(kept)]
    labels = np.array([samples[i].label for i in kept], dtype=np.int64)
    order = {s.path: str(broken[s.path]) for s in samples if s.path in broken}
    return (
        PixelSet(
            torch.from_numpy(pixels), torch.from_numpy(aspect[kept]), torch.from_numpy(labels)
        ),
        order,
    )
