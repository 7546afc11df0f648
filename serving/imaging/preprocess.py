"""Preprocessing: crop an upright image and resize it to a square uint8 array, the model's input."""

from __future__ import annotations

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

_FILTERS: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _is_number(value: object) -> bool:
    # Compared with a float, because `math.isfinite` raises for an int of 400 digits.
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Preprocess:
    """Parameters of preprocessing. They are saved in the checkpoint and in the bundle.

    Attributes:
        size: Side of the network's square input, in pixels.
        crop: Side of the centre square divided by the short side of the image, in (0, 1].
        interpolation: Filter of the resize: bilinear, bicubic or lanczos; always antialiased.
        mean: Mean of each RGB channel, for pixels scaled to 0..1. The subtraction is part of the
            graph.
        std: Standard deviation of each RGB channel, above 0, for pixels scaled to 0..1. The
            division is part of the graph.
        background: RGB colour, 0 to 255, on which transparent images are composited.
    """

    size: int = 224
    crop: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        """Check all fields.

        Raises:
            OptionError: A value is out of range; the message names the field and the value.
        """
        if not (isinstance(self.size, int) and 8 <= self.size <= 4096):
            raise OptionError(f"preprocess.size = {self.size!r}: use 8 to 4096 pixels")
        if not (_is_number(self.crop) and 0 < self.crop <= 1):
            raise OptionError(f"preprocess.crop = {self.crop!r}: use a share in (0, 1]")
        if not isinstance(self.interpolation, str) or self.interpolation not in _FILTERS:
            names = ", ".join(_FILTERS)
            raise OptionError(f"preprocess.interpolation = {self.interpolation!r}: use {names}")
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

    def centre(self, image: Image.Image) -> Box:
        """Return the box (left, top, right, bottom) of the centre crop, in pixels of the image."""
        return self.centre_of(image.size)

    def centre_of(self, size: tuple[int, int]) -> Box:
        """Return the box of the centre crop of an image of `size` (width, height) pixels."""
        side = min(size) * self.crop
        left, top = (size[0] - side) / 2, (size[1] - side) / 2
        return (left, top, left + side, top + side)

    def cut(self, image: Image.Image, box: Box) -> Pixels:
        """Crop an RGB image to `box` and resize the crop to uint8 [size, size, 3]."""
        square = image.resize((self.size, self.size), _FILTERS[self.interpolation], box=box)
        return np.asarray(square)

    def __call__(self, image: Image.Image) -> Pixels:
        """Return the resized centre crop of an RGB image: uint8 [size, size, 3]."""
        return self.cut(image, self.centre(image))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)

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
