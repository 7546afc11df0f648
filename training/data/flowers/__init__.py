"""Draw random pictures of flowers, in ten classes that differ in shape and not in colour.

Colours, light, position and background of all classes are random with the same distributions. Only
the number, shape and arrangement of the petals differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from PIL import Image

from training.data.flowers import frontal, lateral
from training.data.flowers.brush import Canvas, Rng
from training.data.flowers.petals import Palette
from training.data.flowers.scenery import background, finish

__all__ = ["CLASSES", "paint"]

_SPECIES: Final[dict[str, Callable[[Canvas, Rng, Palette], None]]] = {
    "bluebell": lateral.bluebell,
    "buttercup": frontal.buttercup,
    "daisy": frontal.daisy,
    "dandelion": frontal.dandelion,
    "dogwood": frontal.dogwood,
    "lavender": lateral.lavender,
    "lily": frontal.lily,
    "sunflower": frontal.sunflower,
    "trillium": frontal.trillium,
    "tulip": lateral.tulip,
}
CLASSES: Final = tuple(_SPECIES)


def paint(label: str, rng: Rng, size: int = 160) -> Image.Image:
    """Draw the picture of one flower.

    Args:
        label: Class of the flower, one of `CLASSES`.
        rng: Random generator. The same state gives the same picture.
        size: Side of the picture in pixels.

    Returns:
        An RGB picture of `size` x `size` pixels.

    Raises:
        KeyError: `label` is not one of `CLASSES`.
    """
    species = _SPECIES[label]
    pixels, ground = background(rng, size)
    canvas = Canvas(pixels)
    species(canvas, rng, Palette.draw(rng, ground))
    return finish(canvas, rng)
