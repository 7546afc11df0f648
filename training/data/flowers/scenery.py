"""Draw the blurred background of a picture, and apply light, grain and noise at the end."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.data.flowers.brush import (
    BLOOMS,
    GREENS,
    Array,
    Canvas,
    Rng,
    bow,
    colour,
    mix,
    ribbon,
    turn,
)
from training.data.flowers.petals import Petal, petal_outline

GROUNDS = (
    (0.22, 0.38, 0.20),  # meadow
    (0.12, 0.20, 0.14),  # deep shade
    (0.52, 0.64, 0.40),  # spring
    (0.62, 0.74, 0.84),  # sky
    (0.20, 0.26, 0.38),  # dusk
    (0.46, 0.36, 0.28),  # earth
    (0.86, 0.80, 0.70),  # paper
    (0.60, 0.58, 0.56),  # stone
    (0.78, 0.64, 0.62),  # rose wall
    (0.30, 0.20, 0.24),  # plum
)


def background(rng: Rng, size: int) -> tuple[Array, Array]:
    """Draw a random blurred background of `size` x `size` pixels.

    Returns:
        The picture, float32 [size, size, 3], and its mean colour [3].
    """
    small = 72
    base, second = colour(rng, GROUNDS, 0.04), colour(rng, GROUNDS, 0.04)
    grid = int(rng.integers(2, 7))
    weight = rng.random((grid, grid, 1)) * rng.uniform(0.2, 0.9)
    field = base * (1 - weight) + second * weight + rng.normal(0, 0.03, (grid, grid, 3))
    coarse = Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8))
    sheet = coarse.resize((small, small), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(sheet)
    for kind in rng.choice(["grass", "leaves", "stones", "bokeh", "blooms"], 2, replace=False):
        _clutter(str(kind), rng, pen, small, mix(base, second, 0.5))
        sheet = sheet.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 3.2)))
        pen = ImageDraw.Draw(sheet)
    wide = sheet.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(wide, np.float32) / np.float32(255)
    return pixels, pixels.mean(axis=(0, 1))


def _clutter(kind: str, rng: Rng, pen: ImageDraw.ImageDraw, side: int, base: Array) -> None:
    """Draw many objects of one kind, such as leaves, with hard edges. The caller blurs them.

    Args:
        kind: "grass", "leaves", "stones", "bokeh" or "blooms".
        rng: Random generator.
        pen: Draws on the background.
        side: Side of the background in pixels.
        base: Mean colour of the background [3].
    """

    def ink(paint: Array, low: float = 0.65, high: float = 1.25) -> tuple[int, int, int]:
        r, g, b = np.clip(paint * rng.uniform(low, high) * 255, 0, 255).astype(int).tolist()
        return r, g, b

    if kind == "grass":
        for x in rng.uniform(-0.1, 1.1, int(rng.integers(14, 34))):
            start = np.array([x, 1.05], np.float32)
            end = np.array([x + rng.normal(0, 0.2), rng.uniform(0.1, 0.8)], np.float32)
            blade = ribbon(
                bow(start, end, rng.normal(0, 0.1), 8), np.linspace(0.018, 0, 8, dtype=np.float32)
            )
            pen.polygon((blade * side).ravel().tolist(), fill=ink(colour(rng, GREENS)))
    elif kind == "leaves":
        shape = Petal(rng.uniform(0.18, 0.32), 0.7, 0.9)
        leaf = np.stack(petal_outline(shape), axis=1)
        for _ in range(int(rng.integers(8, 20))):
            frame = turn(rng.uniform(0, 2 * np.pi)) * rng.uniform(0.2, 0.5)
            corners = (leaf @ frame.T + rng.uniform(-0.1, 1.1, 2)) * side
            pen.polygon(corners.ravel().tolist(), fill=ink(colour(rng, GREENS)))
    elif kind == "stones":
        for _ in range(int(rng.integers(6, 16))):
            (x, y), r = rng.uniform(0, side, 2), rng.uniform(0.05, 0.16) * side
            y += 0.3 * side
            flat = rng.uniform(0.5, 0.9)
            grey = mix(base, np.full(3, rng.uniform(0.3, 0.8), np.float32), 0.6)
            pen.ellipse((x - r, y - r * flat, x + r, y + r * flat), fill=ink(grey, 0.5, 0.7))
            pen.ellipse((x - r, y - r * flat, x + r * 0.8, y + r * flat * 0.7), fill=ink(grey))
    elif kind == "bokeh":
        for _ in range(int(rng.integers(6, 18))):
            (x, y), r = rng.uniform(0, side, 2), rng.uniform(0.03, 0.12) * side
            glow = mix(base, np.ones(3, np.float32), rng.uniform(0.1, 0.5))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink(glow, 0.95, 1.1))
    else:
        bloom = colour(rng, BLOOMS)
        for _ in range(int(rng.integers(3, 9))):
            (x, y), r = rng.uniform(0, side, 2), rng.uniform(0.04, 0.1) * side
            flat = rng.uniform(0.5, 1.0)
            pen.ellipse((x - r, y - r * flat, x + r, y + r * flat), fill=ink(bloom, 0.7, 1.0))


def finish(canvas: Canvas, rng: Rng) -> Image.Image:
    """Apply light, canvas grain and noise to the whole picture, and convert it to uint8 RGB."""
    size = canvas.size
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    corners = ramp[None] ** 2 + ramp[:, None] ** 2
    light = 1 + rng.uniform(0, 0.16) * slope - rng.uniform(0, 0.1) * corners
    cells = max(size // 3, 1)
    grain = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    cloth = grain.resize((size, size), Image.Resampling.BILINEAR)
    weave = np.asarray(cloth, np.float32) / 255 - 0.5
    light = (light + rng.uniform(0.03, 0.1) * weave) * rng.uniform(0.82, 1.12)
    tint = (1 + rng.normal(0, 0.03, 3)).astype(np.float32)
    pixels = canvas.pixels * light.astype(np.float32)[..., None] * tint
    noise = rng.standard_normal((size, size, 1), np.float32)
    pixels += noise * np.float32(rng.uniform(0.004, 0.018))
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
