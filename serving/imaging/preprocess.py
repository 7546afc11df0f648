"""An upright picture -> the square of uint8 pixels that the graph takes."""

from __future__ import annotations

import math
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
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class Preprocess:
    """How pictures become pixels; saved with the weights and with the bundle, never retyped.

    size: side of the square given to the network, in pixels.
    crop: share of the short side that the centre square takes, in (0, 1].
    interpolation: bilinear, bicubic or lanczos; always antialiased.
    mean, std: per RGB channel, in units of pixel / 255; applied inside the graph.
    background: RGB put under transparent pictures.
    """

    size: int = 224
    crop: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            OptionError: A field is out of its range; the message names it and the value.
        """
        if not (isinstance(self.size, int) and 8 <= self.size <= 4096):
            raise OptionError(f"preprocess.size = {self.size!r}: use 8 to 4096 pixels")
        if not (_is_number(self.crop) and 0 < self.crop <= 1):
            raise OptionError(f"preprocess.crop = {self.crop!r}: use a share in (0, 1]")
        if not isinstance(self.interpolation, str) or self.interpolation not in _FILTERS:
            names = ", ".join(_FILTERS)
            raise OptionError(f"preprocess.interpolation = {self.interpolation!r}: use {names}")
        for name in ("mean", "std", "background"):
            given = getattr(self, name)
            value = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            if len(value) != 3 or not all(_is_number(item) for item in value):
                raise OptionError(f"preprocess.{name} = {given!r}: use three numbers, R, G and B")
            object.__setattr__(self, name, value)
        if min(self.std) <= 0:
            raise OptionError(f"preprocess.std = {self.std!r}: use numbers above 0")
        if not all(isinstance(item, int) and 0 <= item <= 255 for item in self.background):
            raise OptionError(f"preprocess.background = {self.background!r}: use 0 to 255")

    def centre(self, image: Image.Image) -> Box:
        """The box (left, top, right, bottom) of the plain view, in the picture's own pixels."""
        side = min(image.size) * self.crop
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return (left, top, left + side, top + side)

    def cut(self, image: Image.Image, box: Box) -> Pixels:
        """Resize what `box` holds to uint8 [size, size, 3]. Crop and resize are one pass."""
        square = image.resize((self.size, self.size), _FILTERS[self.interpolation], box=box)
        return np.asarray(square)

    def __call__(self, image: Image.Image) -> Pixels:
        """The plain view of an RGB picture: uint8 [size, size, 3]."""
        return self.cut(image, self.centre(image))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`.

        Raises:
            OptionError: An unknown field or a bad value.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise OptionError(f"preprocess has no field {', '.join(sorted(unknown))}")
        return cls(**values)
