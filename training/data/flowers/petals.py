"""Draw petals, leaves and stems, and choose the random colours of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from training.data.flowers.brush import (
    BLOOMS,
    GREENS,
    HEARTS,
    Array,
    Canvas,
    Rng,
    clip,
    colour,
    inverse,
    mix,
    ribbon,
    smooth,
)


@dataclass(frozen=True)
class Petal:
    """Shape of a petal or leaf of length 1.

    At position u along the petal (0: foot, 1: tip) the half-width is proportional to
    `u**base * (1-u)**tip`.

    Attributes:
        width: Largest half-width.
        base: Exponent at the foot; small values make a broad foot.
        tip: Exponent at the tip; values below 0.6 make a round tip, values above 0.9 a pointed one.
        notch: Depth of the notch in the tip; 0: none.
        ruffle: Height of the waves of the edge; 0: none.
        veins: Number of veins.
        spots: Whether dots are drawn near the foot.
    """

    width: float
    base: float
    tip: float
    notch: float = 0.0
    ruffle: float = 0.0
    veins: int = 5
    spots: bool = False

    def half(self, u: Array) -> Array:
        """Return the half-width at the positions `u` (0: foot, 1: tip)."""
        u = clip(u, 0, 1)
        peak = self.base / (self.base + self.tip)
        top = peak**self.base * (1 - peak) ** self.tip
        return np.asarray(self.width / top * u**self.base * (1 - u) ** self.tip, np.float32)


@lru_cache(maxsize=16)
def petal_outline(petal: Petal) -> tuple[Array, Array]:
    """Return the outline of a petal of length 1: coordinates (along [2n], across [2n])."""
    u = ((1 - np.cos(np.linspace(0, np.pi, 22))) / 2).astype(np.float32)
    half = petal.half(u)
    return np.concatenate([u, u[::-1]]), np.concatenate([half, -half[::-1]])


@dataclass(frozen=True)
class Palette:
    """Colours of one picture.

    Attributes:
        petal: Main colour of the petals.
        deep: Colour of the petals at the foot.
        pale: Colour of the petals at the tip.
        heart: Colour of the centre and the stamens.
        green: Colour of leaves and stems.
        light: Direction of the light in radians.
    """

    petal: Array
    deep: Array
    pale: Array
    heart: Array
    green: Array
    light: float

    @staticmethod
    def draw(rng: Rng, ground: Array) -> Palette:
        """Draw random colours. The petals contrast with the background colour `ground` [3]."""
        for _ in range(12):
            petal = colour(rng, BLOOMS)
            if np.abs(petal - ground).sum() > 0.55:
                break
        other = colour(rng, BLOOMS)
        deep = mix(petal * np.float32(rng.uniform(0.5, 0.8)), other, rng.uniform(0, 0.4))
        pale = mix(petal, np.ones(3, np.float32), rng.uniform(0.15, 0.5))
        if rng.random() < 0.3:
            deep, pale = mix(petal, np.ones(3, np.float32), 0.55), deep
        heart = colour(rng, HEARTS)
        for _ in range(12):
            if np.abs(heart - deep).sum() > 0.45:
                break
            heart = colour(rng, HEARTS)
        return Palette(petal, deep, pale, heart, colour(rng, GREENS, 0.03), rng.uniform(-np.pi, 0))


def lay_petal(
    canvas: Canvas,
    rng: Rng,
    colours: Palette,
    petal: Petal,
    foot: Array,
    frame: Array,
    *,
    lit: float = 1.0,
    shadow: float = 0.3,
    leaf: bool = False,
) -> None:
    """Draw one petal or leaf with shading, veins and highlight.

    Args:
        canvas: The canvas to draw on.
        rng: Random generator for the bend and the waves of the edge.
        colours: Colours of the picture.
        petal: Shape of the petal.
        foot: Position [2] of the petal's base.
        frame: Matrix [2, 2] from coordinates (along, across) of the petal to (x, y). It includes
            the length of the petal.
        lit: Brightness factor.
        shadow: Darkness of the soft shadow around the petal, 0 to 1.
        leaf: Whether to use the leaf colours.
    """
    bend = rng.normal(0, 0.06)
    swing = rng.uniform(0, 1)
    along, across = petal_outline(petal)
    across = across * (1 + petal.ruffle * np.sin(17 * along + swing)).astype(np.float32)
    if petal.notch:
        along = along - petal.notch * np.exp(-((across / (0.5 * petal.width)) ** 2)) * along**6
    outline = np.stack([along, across + bend * along**2], axis=1) @ frame.T + foot
    back = inverse(frame)
    angle = float(np.arctan2(frame[1, 0], frame[0, 0]))
    facing = 1 + 0.13 * float(np.cos(angle - colours.light))
    side = float(np.sin(colours.light - angle))
    shine = 0.35 if side > 0 else -0.35
    middle, deep, pale = colours.petal, colours.deep, colours.pale
    if leaf:
        middle, deep, pale = colours.green, colours.green * 0.6, mix(colours.green, pale, 0.2)

    def shade(x: Array, y: Array) -> Array:
        dx, dy = x - foot[0], y - foot[1]
        u = clip(back[0, 0] * dx + back[0, 1] * dy, 0, 1)
        v = back[1, 0] * dx + back[1, 1] * dy - np.float32(bend) * u * u
        r = clip(v / (petal.half(u) + 0.02), -1, 1)
        rr = r * r
        paint = mix(deep, middle, smooth(u, 0.05, 0.55))
        paint += (pale - middle) * (smooth(u, 0.5, 1.05) * (0.35 + 0.65 * rr))[..., None]
        throat = 1 - smooth(u, 0.0, 0.3)
        fold = np.exp(v * v * (-1 / (0.16 * petal.width) ** 2))
        vein = np.cos(r * np.float32(np.pi * petal.veins) + swing)
        gloss = np.exp((u - 0.62) ** 2 * -20 - (r - shine) ** 2 * 8)
        light = 1 - 0.16 * rr + 0.17 * side * r - 0.28 * throat
        light += (0.05 * vein - 0.16 * fold) * (1 - 0.8 * u)
        paint *= (facing * lit * light)[..., None]
        paint += (0.11 * gloss)[..., None]
        return paint

    canvas.lay(outline.astype(np.float32), shade, shadow)
    if petal.spots:
        n = 9
        places = np.stack([rng.uniform(0.18, 0.5, n), rng.normal(0, 0.3, n) * petal.width], axis=1)
        canvas.dots(
            (places @ frame.T + foot).astype(np.float32),
            np.full(n, 0.0045, np.float32),
            deep * 0.45,
            0.7,
        )


def lay_stem(canvas: Canvas, colours: Palette, path: Array, thick: float) -> None:
    """Draw a stem of half-width `thick` along `path` [n, 2], shaded as a cylinder."""
    n = len(path)
    width = np.linspace(thick * 1.25, thick, n, dtype=np.float32)
    canvas.lay(ribbon(path, width), colours.green * 0.7, shadow=0.3)
    shift = np.array([np.cos(colours.light), np.sin(colours.light)], np.float32) * (thick * 0.3)
    canvas.lay(ribbon(path + shift, width * 0.55), mix(colours.green, colours.pale, 0.12) * 1.12)
