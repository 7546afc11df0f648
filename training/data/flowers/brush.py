"""Drawing functions: a canvas for antialiased and shaded shapes, random colours, and curves.

Lengths and positions are fractions of the image's side, with x to the right and y down. A picture
therefore looks the same at every size. Colours are float32 RGB in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float32]
Points = NDArray[np.floating]
Rng = np.random.Generator

_FINE = 3  # supersampling factor: masks are drawn this much larger, then reduced (antialiasing)

# All classes use the same colours.
BLOOMS = (
    (0.98, 0.96, 0.92),  # white
    (0.99, 0.90, 0.66),  # cream
    (0.99, 0.82, 0.18),  # yellow
    (0.98, 0.58, 0.14),  # orange
    (0.97, 0.47, 0.38),  # coral
    (0.84, 0.14, 0.18),  # red
    (0.97, 0.62, 0.74),  # pink
    (0.86, 0.24, 0.56),  # magenta
    (0.76, 0.62, 0.92),  # lilac
    (0.50, 0.26, 0.72),  # violet
    (0.36, 0.46, 0.90),  # blue
    (0.52, 0.10, 0.24),  # wine
)
HEARTS = (
    (0.98, 0.80, 0.20),  # pollen
    (0.90, 0.56, 0.12),  # ochre
    (0.62, 0.72, 0.24),  # lime
    (0.38, 0.22, 0.12),  # brown
    (0.24, 0.12, 0.22),  # aubergine
    (0.96, 0.92, 0.74),  # ivory
)
GREENS = (
    (0.24, 0.44, 0.18),
    (0.36, 0.54, 0.22),
    (0.18, 0.36, 0.24),
    (0.44, 0.56, 0.34),
    (0.30, 0.46, 0.36),
)


def colour(
    rng: Rng, choices: tuple[tuple[float, float, float], ...], spread: float = 0.05
) -> Array:
    """Choose a random colour of `choices`, and add normal noise of standard deviation `spread`."""
    chosen = np.asarray(choices[int(rng.integers(len(choices)))])
    return np.clip(chosen + rng.normal(0, spread, 3), 0.02, 1).astype(np.float32)


def mix(a: Array, b: Array, t: Array | float) -> Array:
    """Interpolate from colour `a` (t = 0) to colour `b` (t = 1): weights t [...] -> [..., 3]."""
    weight = np.asarray(t, np.float32)[..., None]
    return np.asarray(a + (b - a) * weight, np.float32)


def clip(x: Array, low: float, high: float) -> Array:
    """Limit values to [low, high] like np.clip, but several times faster on small arrays."""
    return np.minimum(np.maximum(x, np.float32(low)), np.float32(high))


def smooth(x: Array, low: float, high: float) -> Array:
    """Return the smoothstep of x: 0 for x <= `low`, 1 for x >= `high`, a cubic in between."""
    t = clip((x - low) * np.float32(1 / (high - low)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def turn(angle: float) -> Array:
    """Return the matrix [2, 2] of a rotation by `angle` (radians)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]], np.float32)


def inverse(m: Array) -> Array:
    """Return the inverse of a matrix [2, 2]. This is faster than np.linalg.inv."""
    (a, b), (c, d) = m.tolist()
    return np.array([[d, -b], [-c, a]], np.float32) / np.float32(a * d - b * c)


def bow(start: Array, end: Array, sag: float, steps: int = 16) -> Array:
    """Return points [steps, 2] on a parabola from `start` to `end`.

    The height of the parabola is `sag` times the distance from `start` to `end`.
    """
    t = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
    chord = end - start
    side = np.array([-chord[1], chord[0]], np.float32)
    return np.asarray(start + chord * t + side * (4 * sag * t * (1 - t)), np.float32)


def ribbon(path: Array, width: Array) -> Array:
    """Return the outline [2n, 2] of a band with half-width `width` [n] along `path` [n, 2]."""
    ahead = np.gradient(path, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-9
    side = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) * width[:, None]
    return np.asarray(np.concatenate([path + side, (path - side)[::-1]]), np.float32)


class Canvas:
    """A square picture to draw on. Every shape covers the shapes that were drawn before.

    Attributes:
        pixels: RGB values in [0, 1], float32 [size, size, 3].
        size: Side of the picture in pixels.
    """

    def __init__(self, pixels: Array) -> None:
        """Draw on `pixels`. The array is changed in place."""
        self.pixels = pixels
        self.size = len(pixels)

    def lay(
        self,
        outline: Points,
        paint: Callable[[Array, Array], Array] | Array,
        shadow: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """Draw a filled polygon.

        Args:
            outline: Corners [n, 2].
            paint: A colour [3], or a function of positions x [1, w] and y [h, 1] that returns
                colours [h, w, 3].
            shadow: Darkness of a soft shadow around the shape, 0 to 1.
            opacity: Opacity of the shape, 0 to 1.
        """
        size, blur = self.size, 0.02 * self.size
        margin = 3 * blur if shadow else 1.0
        low = np.maximum(np.floor(outline.min(axis=0) * size - margin), 0).astype(int)
        high = np.minimum(np.ceil(outline.max(axis=0) * size + margin), size).astype(int)
        width, height = (int(side) for side in high - low)
        if width <= 0 or height <= 0:
            return
        mask = Image.new("L", (width * _FINE, height * _FINE))
        corners = (outline * size - low) * _FINE
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=255)
        mask = mask.reduce(_FINE)
        box = self.pixels[low[1] : high[1], low[0] : high[0]]
        if shadow:
            shade = mask.filter(ImageFilter.BoxBlur(blur))
            box *= 1 - np.asarray(shade, np.float32)[..., None] * (shadow / 255)
        if callable(paint):
            x = np.asarray(np.arange(low[0] + 0.5, high[0]) / size, np.float32)
            y = np.asarray(np.arange(low[1] + 0.5, high[1]) / size, np.float32)
            paint = paint(x[None, :], y[:, None])
        box += (paint - box) * (np.asarray(mask, np.float32)[..., None] * (opacity / 255))

    def dots(self, places: Points, radii: Points, paint: Array, opacity: float = 1.0) -> None:
        """Draw dots of one colour `paint` [3] at `places` [n, 2] with `radii` [n]."""
        pen, mask, fine = self._new_mask()
        for (x, y), r in zip(places * fine, radii * fine, strict=True):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        self._blend(mask, paint, opacity)

    def lines(self, segments: Points, width: float, paint: Array, opacity: float = 1.0) -> None:
        """Draw lines of one width and colour. segments: x, y of start and end, [n, 4]."""
        pen, mask, fine = self._new_mask()
        for segment in (segments * fine).tolist():
            pen.line(segment, fill=255, width=max(1, round(width * fine)))
        self._blend(mask, paint, opacity)

    def _new_mask(self) -> tuple[ImageDraw.ImageDraw, Image.Image, int]:
        fine = self.size * _FINE
        mask = Image.new("L", (fine, fine))
        return ImageDraw.Draw(mask), mask, fine

    def _blend(self, mask: Image.Image, paint: Array, opacity: float) -> None:
        box = mask.getbbox()
        if box is None:
            return
        left, top = box[0] // _FINE, box[1] // _FINE
        right, bottom = -(-box[2] // _FINE), -(-box[3] // _FINE)
        cut = mask.crop((left * _FINE, top * _FINE, right * _FINE, bottom * _FINE)).reduce(_FINE)
        part = self.pixels[top:bottom, left:right]
        part += (paint - part) * (np.asarray(cut, np.float32)[..., None] * (opacity / 255))
