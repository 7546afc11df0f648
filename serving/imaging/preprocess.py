"""Preprocessing: from an upright picture to a square uint8 array, the model's input.

A picture may have been decoded at a reduced size. Positions are then given in pixels of the reduced
image, and `area` is the box of the image that the picture covers, such as (0, 0, 252.5, 189): a
picture of 505 pixels is reduced to half of it in 253 pixels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from serving.errors import OptionError

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

DECODES: Final = ("full", "scaled")
FITS: Final = ("crop", "squish", "pad")

REDUCED: Final = 2
"""How many times as large as the network's input the part that it sees is after scaled decoding.
Photos of 12 megapixels then differ from full decoding by 0.2 of 255 on average."""

STRIP: Final = 2**20
"""Pixels of an image that are converted at once before they are reduced."""

_DCT_SCALES: Final = (8, 4, 2)

# Least side of a view's box, in pixels, so that none is divided by 0.
_LEAST: Final = 2**-40
# Largest position of a box divided by its side: Pillow's boxes are float32.
_PRECISE: Final = 2**16

_FILTERS: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


WORDS: Final = {"interpolation": tuple(_FILTERS), "decode": DECODES, "fit": FITS}
"""The words that fields of `Preprocess` accept."""

# What the fields mean in checkpoints and bundles that don't have them.
_BEFORE: Final = {"decode": "full", "fit": "crop"}


def _is_number(value: object) -> bool:
    # Compared with a float, because `math.isfinite` raises for an int of 400 digits.
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Preprocess:
    """Parameters of preprocessing. They are saved in the checkpoint and in the bundle.

    Attributes:
        size: Side of the network's square input, in pixels.
        crop: Side of the centre square divided by the short side of the image, in (0, 1]. Has no
            effect if `fit` is not "crop".
        interpolation: Filter of the resize: bilinear, bicubic or lanczos; always antialiased.
        mean: Mean of each RGB channel, for pixels scaled to 0..1. The subtraction is part of the
            graph.
        std: Standard deviation of each RGB channel, above 0, for pixels scaled to 0..1. The
            division is part of the graph.
        background: RGB colour, 0 to 255, on which transparent images are composited, and of what
            "pad" adds.
        decode: "full", or "scaled": large photos are reduced by an integer while they are decoded,
            so that the part that the network sees stays at least `REDUCED` times `size`.
        fit: What the network sees: "crop" the centre square, "squish" the whole picture, resized to
            a square, "pad" the whole picture in a square of `background`.
    """

    size: int = 224
    crop: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    background: tuple[int, int, int] = (255, 255, 255)
    decode: str = "full"
    fit: str = "crop"

    def __post_init__(self) -> None:
        """Check all fields.

        Raises:
            OptionError: A value is out of range; the message names the field and the value.
        """
        if not (isinstance(self.size, int) and 8 <= self.size <= 4096):
            raise OptionError(f"preprocess.size = {self.size!r}: use 8 to 4096 pixels")
        if not (_is_number(self.crop) and 0 < self.crop <= 1):
            raise OptionError(f"preprocess.crop = {self.crop!r}: use a share in (0, 1]")
        for name, words in WORDS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in words:
                raise OptionError(f"preprocess.{name} = {value!r}: use {', '.join(words)}")
        for name in ("mean", "std", "background"):
            value = getattr(self, name)
            channels = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if len(channels) != 3 or not all(_is_number(item) for item in channels):
                raise OptionError(f"preprocess.{name} = {value!r}: use three numbers, R, G and B")
            object.__setattr__(self, name, channels)
        if min(self.std) <= 0:
            raise OptionError(f"preprocess.std = {self.std!r}: use numbers above 0")
        if not all(isinstance(item, int) and 0 <= item <= 255 for item in self.background):
            raise OptionError(f"preprocess.background = {self.background!r}: use 0 to 255")

    @property
    def kept_share(self) -> float:
        """Side of the plain view divided by that of the largest square that training may see."""
        return self.crop if self.fit == "crop" else 1.0

    def reduction(self, width: int, height: int) -> int:
        """Return the integer by which a picture of a size in pixels may be reduced; 1: not at all.

        The same for a picture and the turned one, and for any number of views.
        """
        if self.decode == "full":
            return 1
        seen = {
            "crop": self.crop * min(width, height),
            "squish": min(width, height),
            "pad": max(width, height),
        }
        return max(1, min(int(seen[self.fit] / (REDUCED * self.size)), width, height))

    def box(self, area: Box, zoom: float = 1.0, x: float = 0.5, y: float = 0.5) -> Box:
        """Return the box (left, top, right, bottom) that a view shows, in pixels of the image.

        With "pad" it may reach beyond the picture.

        Args:
            area: The box of the image that the picture covers.
            zoom: Side of the box of the plain view divided by the side of this box. Where the box
                would be larger than the picture (with its padding), it is as large.
            x, y: Position within the picture (with its padding): 0 left or top, 0.5 centre, 1 right
                or bottom.
        """
        left, top, right, bottom = area
        width, height = right - left, bottom - top
        if self.fit == "crop":
            side = min(min(width, height) * self.crop / zoom, width, height)
            wide = tall = max(side, _LEAST)
        else:
            if self.fit == "pad":
                side = max(width, height)
                left, top = left - (side - width) / 2, top - (side - height) / 2
                width = height = side
            wide, tall = (max(side / max(zoom, 1.0), _LEAST) for side in (width, height))
        left, top = left + (width - wide) * x, top + (height - tall) * y
        return (left, top, left + wide, top + tall)

    def cut(self, image: Image.Image, box: Box, area: Box | None = None) -> Pixels:
        """Resize the part of an RGB image in `box` to uint8 [size, size, 3].

        Args:
            image: The image.
            box: Left, top, right and bottom, in pixels.
            area: The box of the image that the picture covers; None: all of it. What is outside of
                it becomes `background`.
        """
        area = area or (0, 0, *image.size)
        inside = (
            *(max(box[0], area[0]), max(box[1], area[1])),
            *(min(box[2], area[2]), min(box[3], area[3])),
        )
        if self.fit == "pad" and (inside[0] >= inside[2] or inside[1] >= inside[3]):
            return np.full((self.size, self.size, 3), self.background, np.uint8)
        left, right = self._columns(inside[0::2], box[0::2])
        top, bottom = self._columns(inside[1::2], box[1::2])
        if any((inside[i + 2] - inside[i]) * _PRECISE < inside[i] for i in (0, 1)):
            x, y = (min(math.floor(inside[i]), image.size[i] - 1) for i in (0, 1))
            right_x, bottom_y = max(math.ceil(inside[2]), x + 1), max(math.ceil(inside[3]), y + 1)
            image = image.crop((x, y, right_x, bottom_y))
            inside = (inside[0] - x, inside[1] - y, inside[2] - x, inside[3] - y)
        seen = image.resize((right - left, bottom - top), _FILTERS[self.interpolation], box=inside)
        if seen.size == (self.size, self.size):
            return np.asarray(seen)
        square = Image.new("RGB", (self.size, self.size), self.background)
        square.paste(seen, (left, top))
        return np.asarray(square)

    def _columns(self, inside: tuple[float, ...], box: tuple[float, ...]) -> tuple[int, int]:
        """Return the first and the last (exclusive) column that the picture takes in the square."""
        if box[0] == box[1]:  # it is too small for its place
            return 0, self.size
        scale = self.size / (box[1] - box[0])
        first = min(round((inside[0] - box[0]) * scale), self.size - 1)
        return first, max(first + 1, round((inside[1] - box[0]) * scale))

    def __call__(self, image: Image.Image, area: Box | None = None) -> Pixels:
        """Return the plain view of an upright RGB image: uint8 [size, size, 3].

        Args:
            image: The image.
            area: The box of the image that the picture covers; None: all of it.
        """
        return self.cut(image, self.box(area or (0, 0, *image.size)), area)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON, without those that mean what was before."""
        return {name: value for name, value in asdict(self).items() if _BEFORE.get(name) != value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Create an instance from a dictionary that `to_dict` returned.

        Raises:
            OptionError: A key is not the name of a field, or a value is out of range.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise OptionError(f"preprocess has no field {', '.join(sorted(unknown))}")
        return cls(**values)


def dct_scale(reduction: int) -> int:
    """Return by how much of a reduction libjpeg decodes a JPEG smaller: 1, 2, 4 or 8."""
    return next((scale for scale in _DCT_SCALES if scale <= reduction), 1)
