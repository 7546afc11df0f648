"""Scale the samples of images with more than 8 bits to 0..255, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of a TIFF

_STRIP: Final = 2**20  # samples that are scaled at once
Samples = npt.NDArray[np.float64]


def scale(image: Image.Image) -> Image.Image:
    """Scale samples of more than 8 bits linearly to 0..255. Pillow's `convert` would clip them."""
    tags = getattr(image, "tag_v2", {})
    low, high = 0.0, 4095.0 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535.0
    if image.mode in ("F", "I"):
        ends = np.array([(strip.min(), strip.max()) for _, strip in _strips(image)])
        if not np.isfinite(ends).all():
            raise ValueError("samples are not finite")
        low, high = min(0.0, ends.min()), ends.max()
        # The smallest usual range that fits, because scaling by the maximum would brighten dark
        # photos.
        high = next((top for top in (1.0, 255.0, 65535.0) if high <= top), high)
    if tags.get(_PHOTOMETRIC) == 0:  # WhiteIsZero, which Pillow applies only up to 8 bits
        low, high = high, low

    def to_bytes(strip: Samples) -> Samples:
        strip -= low
        strip *= 255.0 / (high - low)
        return np.rint(strip, out=strip)

    return Image.fromarray(by_strips(image, to_bytes))


def by_strips(image: Image.Image, change: Callable[[Samples], Samples]) -> npt.NDArray[np.uint8]:
    """Apply `change` to the samples of an image, some rows at a time, to limit memory.

    Args:
        image: Image with one channel.
        change: Function of float64 samples [rows, W] that returns values of 0 to 255.

    Returns:
        The changed samples, uint8 [H, W].
    """
    changed = np.empty((image.height, image.width), np.uint8)
    for rows, strip in _strips(image):
        changed[rows] = change(strip)
    return changed


def _strips(image: Image.Image) -> Iterator[tuple[slice, Samples]]:
    """Yield each strip of an image: a slice of row numbers, and samples as float64 [rows, W]."""
    step = max(1, _STRIP // image.width)
    for top in range(0, image.height, step):
        rows = slice(top, min(top + step, image.height))
        with np.errstate(invalid="ignore"):  # a signalling NaN; `scale` rejects NaN
            strip = np.array(image.crop((0, rows.start, image.width, rows.stop)), np.float64)
        yield rows, strip
