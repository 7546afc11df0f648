"""How a photo becomes the pixels that training works with, and what those pixels are known by."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cache as once
from typing import Final, Literal

import numpy as np
from PIL import Image, features

from serving.imaging.preprocess import Pixels, Preprocess
from training.pixels.store import FORMAT

# Whose versions decide pixels.
_LIBRARIES: Final = (
    *("pil", "jpg", "libjpeg_turbo", "mozjpeg", "zlib", "zlib_ng", "webp", "avif"),
    *("libtiff", "littlecms2"),
)


PIXELS_VERSION: Final = 1
"""Version of the pixels. Raise it when a change to decoding, to the image policy, to `Preprocess`
or to `squeeze` changes any pixel; `test_cache_versions.py` fails until then."""


def squeeze(image: Image.Image, side: int) -> Pixels:
    """A whole photo as training keeps it: uint8 [side, side, 3]."""
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class PixelTransform:
    """How the photos of a part become pixels: all that decides them, besides the photo.

    presize: side of training photos in image sizes; those of validation have the image size.
    """

    part: Literal["train", "valid"]
    preprocess: Preprocess
    presize: float

    @property
    def side(self) -> int:
        """Of the squares, in pixels."""
        size = self.preprocess.size
        return round(size * self.presize) if self.part == "train" else size

    def __call__(self, image: Image.Image) -> Pixels:
        """An upright picture -> uint8 [side, side, 3]."""
        if self.part == "train":
            return squeeze(image, self.side)
        return self.preprocess(image)

    @property
    def name(self) -> str:
        """Of the entry of the cache; pixels that may differ by one bit have another."""
        p = self.preprocess
        cut = [p.crop, p.interpolation] if self.part == "valid" else []
        decides = [self.part, self.side, p.background, cut, _decoder()]
        key = hashlib.sha256(json.dumps(decides).encode())
        return f"pixels-{key.hexdigest()[:32]}"

    def __str__(self) -> str:
        return f"{self.part} photos at {self.side} px"


@once
def _decoder() -> list[str]:
    """Versions of our own rules and of the libraries: another one is another decoder."""
    known = {*features.modules, *features.codecs, *features.features}
    versions = [f"{name} {features.version(name)}" for name in _LIBRARIES if name in known]
    return [f"format {FORMAT}", f"pixels {PIXELS_VERSION}", platform.machine(), *versions]
