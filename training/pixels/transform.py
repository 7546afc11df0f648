"""Resize or preprocess decoded photos to uint8 squares for training and validation.

The module also computes the name of the cache entry that stores these squares.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Final, Literal

from PIL import features

from serving.imaging import formats
from serving.imaging.decode import Decoded
from serving.imaging.preprocess import Pixels, Preprocess
from training.pixels.store import FORMAT

# Libraries of Pillow whose versions may change pixels.
_LIBRARIES: Final = (
    *("pil", "jpg", "libjpeg_turbo", "mozjpeg", "zlib", "zlib_ng", "webp", "avif"),
    *("libtiff", "littlecms2"),
)


PIXELS_VERSION: Final = 1
"""Version number of the cached pixels, in the cache key. Increase it if a change to decoding or to
`Preprocess` changes a pixel. Without the increase, `test_cache_versions.py` fails.
"""


@dataclass(frozen=True)
class PixelTransform:
    """Transform from a decoded photo to a uint8 square.

    Attributes:
        part: Split of the dataset: photos of "train" are resized to a square, which changes their
            aspect ratio, after they are padded to one if `Preprocess.fit` is "pad"; photos of
            "valid" are preprocessed as in serving.
        preprocess: Preprocessing of the model.
        presize: Side of the training squares as a multiple of the model's image size.
    """

    part: Literal["train", "valid"]
    preprocess: Preprocess
    presize: float

    @property
    def side(self) -> int:
        """Side of the squares in pixels."""
        size = self.preprocess.size
        return round(size * self.presize) if self.part == "train" else size

    @property
    def to_square(self) -> Preprocess:
        """Preprocessing that gives the squares; a decoder may reduce photos for it."""
        if self.part == "valid":
            return self.preprocess
        fit = "pad" if self.preprocess.fit == "pad" else "squish"
        return replace(self.preprocess, size=self.side, fit=fit, interpolation="bilinear")

    def __call__(self, photo: Decoded) -> Pixels:
        """Transform a photo to pixels, uint8 [side, side, 3]."""
        return self.to_square(photo.image, photo.area)

    def aspect(self, photo: Decoded) -> float:
        """Return width / height of what a square shows, which the augmentation restores.

        It is 1 where the network sees whole photos as squares.
        """
        width, height = photo.size
        return width / height if self.preprocess.fit == "crop" else 1.0

    @property
    def name(self) -> str:
        """Name of the cache entry, with a hash of everything that can change a pixel."""
        p = self.preprocess
        crop = [p.crop, p.interpolation] if self.part == "valid" else []
        inputs = [self.part, self.side, p.background, crop, p.decode, p.fit, _versions()]
        key = hashlib.sha256(json.dumps(inputs).encode())
        return f"pixels-{key.hexdigest()[:32]}"

    def __str__(self) -> str:
        return f"{self.part} photos at {self.side} px"


@cache
def _versions() -> list[str]:
    """Return the machine type, and the versions of file format, pixels and Pillow's libraries."""
    known = {*features.modules, *features.codecs, *features.features}
    versions = [f"{name} {features.version(name)}" for name in _LIBRARIES if name in known]
    # With a package, photos can be read that were recorded as unreadable without it.
    optional = [one.distribution for one in formats.OPTIONAL if one.installed]
    versions += [f"{name} {metadata.version(name)}" for name in optional]
    return [f"format {FORMAT}", f"pixels {PIXELS_VERSION}", platform.machine(), *versions]
