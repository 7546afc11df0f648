"""The test image of the corpus, the class of its items, and encoding functions."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, features

Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

SIZE = (64, 32)
RED, GREEN, BLUE, YELLOW = (200, 30, 30), (30, 160, 60), (40, 60, 200), (230, 200, 40)
QUARTERS: tuple[Colour, ...] = (RED, GREEN, BLUE, YELLOW)
"""Upper left, upper right, lower left, lower right; every rotation and flip changes the order."""

WHITE, BLACK = (255, 255, 255), (0, 0, 0)

HAS_AVIF = bool(features.check("avif"))
_PLACEHOLDER_AVIF = b"\0\0\0\x1cftypavif" + bytes(8) + b"ispe" + bytes(99)


@dataclass(frozen=True)
class Item:
    """A file and its expected result in the library, the service and the scorer.

    Attributes:
        name: Unique name.
        data: The file.
        code: Code of the expected error; None if the file must be decoded.
        applied: Expected conversions of the decoded image.
        size: Expected width and height after applying the orientation.
        colours: Expected colours in the middle of each quarter, in the order of `QUARTERS`.
        tolerance: Largest allowed difference of a channel.
    """

    name: str
    data: bytes
    code: str | None = None
    applied: tuple[str, ...] = ()
    size: tuple[int, int] = SIZE
    colours: tuple[Colour, ...] = QUARTERS
    tolerance: int = 2


def good(
    name: str,
    data: bytes,
    *applied: str,
    size: tuple[int, int] = SIZE,
    colours: tuple[Colour, ...] = QUARTERS,
    tolerance: int = 2,
) -> Item:
    return Item(name, data, None, applied, size, colours, tolerance)


def bad(name: str, data: bytes, code: str = "broken-image") -> Item:
    return Item(name, data, code)


def greys(*values: int) -> tuple[Colour, ...]:
    return tuple((value, value, value) for value in values)


def quarters(values: list[object], dtype: object = np.uint8) -> npt.NDArray[np.generic]:
    """Four values, numbers or tuples, as an array of `SIZE`: one per quarter."""
    block = np.array(values, dtype).reshape(2, 2, *np.shape(values[0]))
    return block.repeat(SIZE[1] // 2, axis=0).repeat(SIZE[0] // 2, axis=1)


SCENE: Pixels = quarters(list(QUARTERS))  # type: ignore[assignment]
INDICES: Pixels = quarters([0, 1, 2, 3])  # type: ignore[assignment]


def scene() -> Image.Image:
    return Image.fromarray(SCENE)


def noise(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Random pixels, which cannot be compressed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    if kind == "AVIF" and not HAS_AVIF:
        return _PLACEHOLDER_AVIF  # without AVIF support corpus.items() omits the item
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


BEST_QUALITY: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "AVIF": {"quality": 95, "subsampling": "4:4:4", "speed": 10},
    "WEBP": {"lossless": True, "exact": True},
}
"""Encoding options that preserve the colours."""


def encode_best(image: Image.Image, kind: str, **options: object) -> bytes:
    return encode(image, kind, **BEST_QUALITY.get(kind, {}), **options)
