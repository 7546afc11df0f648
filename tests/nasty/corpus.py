"""All odd and broken files, each with what it must give."""

from __future__ import annotations

from tests.nasty import (
    bmps,
    clear,
    cuts,
    deep,
    gifs,
    inks,
    jpegs,
    pngs,
    profiled,
    sizes,
    strangers,
    tiffs,
    turned,
    webps,
)
from tests.nasty.scene import HAS_AVIF, Item

_PARTS = (
    *(turned, deep, clear, inks, profiled),
    *(jpegs, pngs, gifs, webps, bmps, tiffs),
    *(sizes, cuts, strangers),
)


def items() -> list[Item]:
    found = [item for part in _PARTS for item in part.items()]
    return [item for item in found if HAS_AVIF or "avif" not in item.name.lower()]
