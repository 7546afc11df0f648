"""The corpus: odd and broken image files, each with its expected result."""

from __future__ import annotations

from tests.robustness import (
    bit_depths,
    bmps,
    colour_profiles,
    colour_spaces,
    gifs,
    jpegs,
    orientation,
    plugin_formats,
    pngs,
    sizes,
    tiffs,
    transparency,
    truncation,
    unsupported_formats,
    webps,
)
from tests.robustness.scene import HAS_AVIF, Item

_PARTS = (
    *(orientation, bit_depths, transparency, colour_spaces, colour_profiles),
    *(jpegs, pngs, gifs, webps, bmps, tiffs, plugin_formats),
    *(sizes, truncation, unsupported_formats),
)


def items() -> list[Item]:
    found = [item for part in _PARTS for item in part.items()]
    return [item for item in found if HAS_AVIF or "avif" not in item.name.lower()]
