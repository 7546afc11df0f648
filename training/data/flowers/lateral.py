"""Draw the classes of flowers that are seen from the side: tulip, bluebell and lavender."""

from __future__ import annotations

import numpy as np

from training.data.flowers.brush import Array, Canvas, Rng, bow, mix, turn
from training.data.flowers.petals import Palette, Petal, lay_petal, lay_stem

_DOWN = np.array([0.0, 1.0], np.float32)


def tulip(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a tulip: a closed cup of five petals on a stem between two leaves."""
    height = rng.uniform(0.42, 0.6)
    foot = np.array([rng.uniform(0.36, 0.64), rng.uniform(0.66, 0.8)], np.float32)
    lean = -np.pi / 2 + rng.normal(0, 0.22)
    end = np.array([foot[0] + rng.normal(0, 0.12), 1.1], np.float32)
    lay_stem(canvas, colours, bow(foot, end, rng.normal(0, 0.06)), rng.uniform(0.014, 0.022))
    blade = Petal(0.12, 0.6, 0.9, veins=6)
    for tilt in (-0.45, 0.45):
        frame = turn(-np.pi / 2 + tilt + rng.normal(0, 0.12)) * rng.uniform(0.45, 0.7)
        lay_petal(canvas, rng, colours, blade, end - 0.1 * _DOWN, frame, leaf=True)
    wide = rng.uniform(0.85, 1.1)
    # (angle, length, half-width, brightness), from the back to the front
    for angle, length, width, lit in (
        (-0.2, 0.98, 0.25, 0.72),
        (0.22, 0.96, 0.25, 0.76),
        (-0.36, 0.98, 0.24, 0.94),
        (0.36, 1.0, 0.24, 0.98),
        (0.0, 0.9, 0.3, 1.08),
    ):
        shape = Petal(width * wide, 0.5, 0.62, veins=6)
        frame = turn(lean + (angle + rng.normal(0, 0.03)) * wide) * (height * length)
        lay_petal(canvas, rng, colours, shape, foot, frame, lit=lit, shadow=0.35)


def _bell(canvas: Canvas, rng: Rng, colours: Palette, top: Array, frame: Array) -> None:
    """Draw one hanging bell with curled lobes.

    Args:
        canvas: The canvas to draw on.
        rng: Random generator.
        colours: Colours of the picture.
        top: Position [2] of the upper end of the bell.
        frame: Matrix [2, 2] from coordinates (along, across) of the bell to (x, y).
    """
    lobe = Petal(0.2, 0.55, 0.7, veins=2)
    for angle, lit in ((-0.75, 0.75), (0.75, 0.78)):
        at = top + frame @ np.array([0.62, 0.28 * np.sign(angle)], np.float32)
        lay_petal(canvas, rng, colours, lobe, at, frame @ turn(angle) * 0.5, lit=lit)
    u = np.linspace(0, 1, 20, dtype=np.float32)
    half = 0.3 * np.sqrt(np.minimum(u * 5, 1)) * (0.85 + 0.45 * u**3)
    hem = np.linspace(1, -1, 13, dtype=np.float32)
    scallop = np.stack([1 + 0.13 * np.cos(hem * 3 * np.pi), hem * half[-1]], 1)
    local = np.concatenate([np.stack([u, half], 1), scallop, np.stack([u, -half], 1)[::-1]])
    back = np.linalg.inv(frame).astype(np.float32)
    angle = float(np.arctan2(frame[1, 0], frame[0, 0]))
    side = float(np.sin(colours.light - angle))

    def glaze(x: Array, y: Array) -> Array:
        dx, dy = x - top[0], y - top[1]
        u = back[0, 0] * dx + back[0, 1] * dy
        r = np.clip((back[1, 0] * dx + back[1, 1] * dy) / 0.36, -1, 1)
        u = np.clip(u, 0, 1)
        body = mix(colours.deep, colours.petal, np.minimum(u * 1.6, 1))
        paint = mix(body, colours.pale, 0.5 * u**3)
        light = 1.04 - 0.24 * r * r + 0.22 * side * r + 0.06 * np.cos(r * 9)
        paint *= light.astype(np.float32)[..., None]
        paint += (0.14 * np.exp(-(((r - 0.4 * np.sign(side)) / 0.22) ** 2)))[..., None]
        return paint

    canvas.lay((local @ frame.T + top).astype(np.float32), glaze, shadow=0.35)


def bluebell(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a bluebell: four to six bells that hang from a curved stem."""
    side = rng.choice([-1.0, 1.0])
    foot = np.array([0.5 - side * rng.uniform(0.1, 0.3), 1.1], np.float32)
    peak = np.array([0.5 + rng.uniform(-0.12, 0.12), rng.uniform(0.08, 0.2)], np.float32)
    nod = peak + np.array([side * rng.uniform(0.2, 0.32), rng.uniform(0.08, 0.22)], np.float32)
    t = np.linspace(0, 1, 40, dtype=np.float32)[:, None]
    crest = 2 * peak - (foot + nod) / 2
    crest[1] = peak[1] - 0.12
    path = (1 - t) ** 2 * foot + 2 * t * (1 - t) * crest + t**2 * nod
    blade = Petal(0.06, 0.5, 0.9, veins=3)
    for tilt in rng.normal(0, 0.4, int(rng.integers(1, 3))):
        lay_petal(canvas, rng, colours, blade, foot, turn(-1.57 + tilt) * 0.6, leaf=True)
    lay_stem(canvas, colours, path.astype(np.float32), 0.011)
    count = int(rng.integers(4, 7))
    length = rng.uniform(0.2, 0.27)
    for i, at in enumerate(np.linspace(15, 39, count).astype(int)):
        turned = (-1) ** i * (0.5 - 0.4 * i / count) + rng.normal(0, 0.1)
        reach = length * (1.1 - 0.35 * i / count)
        tip = path[at] + 0.3 * reach * np.array([np.sin(-turned), 0.7], np.float32)
        hook = bow(path[at], tip.astype(np.float32), 0.12 * np.sign(turned), 6)
        lay_stem(canvas, colours, hook, 0.006)
        frame = (turn(np.pi / 2 + turned) * reach).astype(np.float32)
        _bell(canvas, rng, colours, tip.astype(np.float32), frame)


def lavender(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw lavender: one to three upright spikes of florets (small flowers)."""
    spikes = int(rng.integers(1, 4))
    middle = rng.uniform(0.4, 0.6)
    for i in rng.permutation(spikes):
        offset = (i - (spikes - 1) / 2) * rng.uniform(0.18, 0.26)
        top = np.array([middle + offset * 1.2, rng.uniform(0.06, 0.2)], np.float32)
        foot = np.array([middle + offset * 0.4 + rng.normal(0, 0.05), 1.1], np.float32)
        path = bow(foot, top, rng.normal(0, 0.07), 60)
        lay_stem(canvas, colours, path, 0.009)
        leaf = Petal(0.07, 0.6, 0.9, veins=3)
        for tilt in (-0.6, 0.6):
            frame = turn(-np.pi / 2 + tilt + rng.normal(0, 0.1)) * rng.uniform(0.18, 0.3)
            lay_petal(canvas, rng, colours, leaf, path[int(rng.integers(4, 18))], frame, leaf=True)
        _spike(canvas, rng, colours, path[rng.integers(22, 28) :])


def _spike(canvas: Canvas, rng: Rng, colours: Palette, path: Array) -> None:
    """Draw groups of four florets along `path` [n, 2]. Their size decreases towards the end."""
    floret = Petal(0.3, 0.6, 0.5, veins=2)
    rows = int(rng.integers(8, 11))
    for row, at in enumerate(np.linspace(0, len(path) - 2, rows).astype(int)):
        ahead = path[at + 1] - path[at]
        heading = float(np.arctan2(ahead[1], ahead[0]))
        reach = rng.uniform(0.085, 0.105) * (1 - 0.5 * row / rows)
        for spread in (-1.0, 1.0, -0.35, 0.35):
            angle = heading + spread + rng.normal(0, 0.15)
            lit = 1.04 - 0.2 * abs(spread)
            size = reach * rng.uniform(0.85, 1.1)
            lay_petal(canvas, rng, colours, floret, path[at], turn(angle) * size, lit=lit)
