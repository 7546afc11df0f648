"""The transform from a decoded photo to training or validation pixels, and its cache key."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
from PIL import Image, features

from serving.imaging.preprocess import Pixels, Preprocess
from training.pixels.store import FORMAT

# Libraries of Pillow whose versions may change pixels.
_LIBRARIES: Final = (
    *("pil", "jpg", "libjpeg_turbo", "mozjpeg", "zlib", "zlib_ng", "webp", "avif"),
    *("libtiff", "littlecms2"),
)


PIXELS_VERSION: Final = 1
"""Version of the pixels, part of the cache key. Increase it when a change to decoding, to the image
policy, to `Preprocess` or to `squeeze` changes any pixel; `test_cache_versions.py` fails until
then."""


def squeeze(image: Image.Image, side: int) -> Pixels:
    """Resize a photo to a square, ignoring its aspect ratio: uint8 [side, side, 3]."""
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class PixelTransform:
    """Transform from a photo to its pixels. The fields determine the pixels of a given photo.

    Attributes:
        part: Part of the dataset: training photos are squeezed to a square, validation photos are
            preprocessed as in serving.
        preprocess: Preprocessing of the model.
        presize: Side of the training squares as a multiple of the image size.
    """

    part: Literal["train", "valid"]
    preprocess: Preprocess
    presize: float

    @property
    def side(self) -> int:
        """Side of the squares in pixels."""
        size = self.preprocess.size
        return round(size * self.presize) if self.part == "train" else size

    def __call__(self, image: Image.Image) -> Pixels:
        """An upright RGB image -> uint8 [side, side, 3]."""
        if self.part == "train":
            return squeeze(image, self.side)
        return self.preprocess(image)

    @property
    def name(self) -> str:
        """Name of the cache entry: a hash of everything that can change a pixel."""
        p = self.preprocess
        crop = [p.crop, p.interpolation] if self.part == "valid" else []
        inputs = [self.part, self.side, p.background, crop, _versions()]
        key = hashlib.sha256(json.dumps(inputs).encode())
        return f"pixels-{key.hexdigest()[:32]}"

    def __str__(self) -> str:
        return f"{self.part} photos at {self.side} px"


@cache
def _versions() -> list[str]:
    """Versions of the format, of the pixels, of the machine type and of Pillow's libraries."""
    known = {*features.modules, *features.codecs, *features.features}
    versions = [f"{name} {features.version(name)}" for name in _LIBRARIES if name in known]
    return [f"format {FORMAT}", f"pixels {PIXELS_VERSION}", platform.machine(), *versions]
