"""Painted flowers: ten kinds told apart by their shape, whatever their colour.

Every kind draws its colours, light, place and surroundings from the same distributions; only the
number, the shape and the arrangement of the petals differ.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from training.brush import (
    Array,
    Canvas,
    Palette,
    Petal,
    Rng,
    bow,
    lay_petal,
    lay_stem,
    mix,
    turn,
)
from training.scenery import background, finish

_GOLDEN = np.pi * (3 - np.sqrt(5))
_DOWN = np.array([0.0, 1.0], np.float32)


def paint(label: str, rng: Rng, size: int = 160) -> Image.Image:
    """Paint one flower.

    Args:
        label: One of `CLASSES`.
        rng: Decides everything else; the same state gives the same picture.
        size: Side in pixels.

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


# --- flowers seen from the front ---------------------------------------------------------------


def _pose(rng: Rng) -> tuple[Array, Array]:
    """Place of the heart [2], and the matrix [2, 2] of size, tilt and turn for a radius of 1."""
    radius = rng.uniform(0.31, 0.43)
    slack = max(0.5 - radius, 0.06)
    centre = 0.5 + rng.uniform(-slack, slack, 2)
    tilt = turn(rng.uniform(0, np.pi))
    squash = np.diag([1.0, rng.uniform(0.82, 1.0)])
    return centre.astype(np.float32), (tilt @ squash @ tilt.T * radius).astype(np.float32)


def _footing(canvas: Canvas, rng: Rng, colours: Palette, top: Array) -> None:
    """A stem from `top` out of the picture, most of the time, with a leaf or two."""
    if rng.random() < 0.15:
        return
    end = np.array([top[0] + rng.normal(0, 0.2), 1.1], np.float32)
    path = bow(top, end, rng.normal(0, 0.08))
    lay_stem(canvas, colours, path, rng.uniform(0.011, 0.02))
    for _ in range(int(rng.integers(0, 3))):
        leaf = Petal(rng.uniform(0.13, 0.22), 0.7, 0.9, veins=7)
        frame = turn(rng.choice([-0.6, -2.5]) + rng.normal(0, 0.3)) * rng.uniform(0.2, 0.38)
        place = path[int(rng.integers(5, 14))]
        lay_petal(canvas, rng, colours, leaf, place, frame, leaf=True)


def _whorl(
    canvas: Canvas,
    rng: Rng,
    colours: Palette,
    petal: Petal,
    count: int,
    centre: Array,
    pose: Array,
    *,
    reach: float = 1.0,
    phase: float = 0.0,
    lit: float = 1.0,
    loose: float = 0.1,
    leaf: bool = False,
) -> None:
    """Lay `count` petals around `centre`, each a little different."""
    step = 2 * np.pi / count
    for i in range(count):
        angle = phase + step * (i + rng.normal(0, loose * 0.5))
        length = reach * (1 + rng.normal(0, loose * 0.5))
        frame = (pose @ turn(angle) * length).astype(np.float32)
        tone = lit * (1 + rng.normal(0, 0.04))
        lay_petal(canvas, rng, colours, petal, centre, frame, lit=tone, leaf=leaf)


def _disc(canvas: Canvas, colours: Palette, centre: Array, pose: Array, reach: float) -> None:
    """A domed heart of seeds in the spiral order that they grow in."""
    t = np.linspace(0, 2 * np.pi, 40)
    rim = (np.stack([np.cos(t), np.sin(t)], axis=1) * reach) @ pose.T + centre
    sun = np.array([np.cos(colours.light), np.sin(colours.light)])
    back = np.linalg.inv(pose * reach).astype(np.float32)

    def dome(x: Array, y: Array) -> Array:
        dx, dy = x - centre[0], y - centre[1]
        a, b = back[0, 0] * dx + back[0, 1] * dy, back[1, 0] * dx + back[1, 1] * dy
        light = 0.92 + 0.3 * (a * sun[0] + b * sun[1]) - 0.3 * (a * a + b * b) ** 2
        return np.asarray(colours.heart * light[..., None], np.float32)

    canvas.lay(rim.astype(np.float32), dome, shadow=0.45)
    seeds = int(np.clip(900 * reach * reach, 26, 150))
    i = np.arange(seeds) + 0.5
    spiral = np.sqrt(i / seeds)[:, None] * np.stack([np.cos(i * _GOLDEN), np.sin(i * _GOLDEN)], 1)
    places = (spiral * (0.95 * reach)) @ pose.T + centre
    grain = float(np.sqrt(np.abs(np.linalg.det(pose)))) * reach * 0.62 / np.sqrt(seeds)
    radii = np.full(seeds, grain, np.float32)
    canvas.dots((places - 0.3 * grain * sun).astype(np.float32), radii, colours.heart * 0.5, 0.6)
    bright = mix(colours.heart, np.array([1, 0.95, 0.7], np.float32), 0.35)
    canvas.dots((places + 0.3 * grain * sun).astype(np.float32), radii * 0.7, bright, 0.75)


def _stamens(
    canvas: Canvas, rng: Rng, colours: Palette, centre: Array, pose: Array, count: int, reach: float
) -> None:
    """Threads from the heart, each with a grain of pollen."""
    angle = np.arange(count) * 2 * np.pi / count + rng.normal(0, 0.15, count)
    length = reach * rng.uniform(0.75, 1.1, count)
    ends = (np.stack([np.cos(angle), np.sin(angle)], 1) * length[:, None]) @ pose.T + centre
    foot = np.broadcast_to(centre, ends.shape)
    thread = mix(colours.heart, colours.pale, 0.5)
    canvas.lines(np.concatenate([foot, ends], 1).astype(np.float32), 0.007, thread, 0.9)
    grain = np.full(count, 0.011, np.float32)
    canvas.dots((ends + 0.004).astype(np.float32), grain, colours.heart * 0.45, 0.7)
    canvas.dots(ends.astype(np.float32), grain, colours.heart)


def _daisy(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    count, start = int(rng.integers(15, 22)), rng.uniform(0, 6)
    petal = Petal(rng.uniform(0.085, 0.11), 0.42, 0.3, veins=2)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start + 0.2, lit=0.82)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start, reach=0.94)
    _disc(canvas, colours, centre, pose, rng.uniform(0.2, 0.27))


def _sunflower(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    count, start = int(rng.integers(15, 20)), rng.uniform(0, 6)
    petal = Petal(rng.uniform(0.12, 0.15), 0.8, 0.75, veins=3)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start + 0.2, lit=0.78)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start, reach=0.93)
    _disc(canvas, colours, centre, pose, rng.uniform(0.46, 0.54))


def _trillium(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    start = rng.uniform(0, 6)
    sepal = Petal(0.15, 0.7, 0.9, veins=5)
    _whorl(
        canvas, rng, colours, sepal, 3, centre, pose, phase=start + np.pi / 3, reach=0.85, leaf=True
    )
    petal = Petal(rng.uniform(0.36, 0.43), 0.62, 0.7, ruffle=0.05, veins=7)
    _whorl(canvas, rng, colours, petal, 3, centre, pose, phase=start)
    _stamens(canvas, rng, colours, centre, pose, 6, 0.2)


def _dogwood(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    petal = Petal(rng.uniform(0.38, 0.44), 0.75, 0.33, notch=rng.uniform(0.14, 0.2), veins=7)
    _whorl(canvas, rng, colours, petal, 4, centre, pose, phase=rng.uniform(0, 6), loose=0.06)
    _disc(canvas, colours, centre, pose, rng.uniform(0.12, 0.16))


def _buttercup(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    petal = Petal(rng.uniform(0.44, 0.5), 0.6, 0.3, veins=6)
    _whorl(canvas, rng, colours, petal, 5, centre, pose, phase=rng.uniform(0, 6), loose=0.06)
    _stamens(canvas, rng, colours, centre, pose, 17, 0.3)
    _disc(canvas, colours, centre, pose, 0.14)


def _lily(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    start = rng.uniform(0, 6)
    petal = Petal(rng.uniform(0.16, 0.2), 0.6, 0.85, ruffle=0.04, veins=4, spots=True)
    for phase, lit in ((start + np.pi / 3, 0.86), (start, 1.0)):
        _whorl(canvas, rng, colours, petal, 3, centre, pose, reach=1.1, phase=phase, lit=lit)
    _stamens(canvas, rng, colours, centre, pose, 6, 0.5)


def _dandelion(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    centre, pose = _pose(rng)
    _footing(canvas, rng, colours, centre)
    _haze(canvas, colours, centre, pose)
    count = 84
    i = np.arange(count) + 0.5
    depth = 1 - 1.7 * i / count  # from the pole that faces us to some way round the back
    ring = np.sqrt(1 - depth**2)
    ball = np.stack([ring * np.cos(i * _GOLDEN), ring * np.sin(i * _GOLDEN)], 1)
    ball *= 0.83 * (1 + rng.normal(0, 0.03, (count, 1)))
    spokes = np.arange(12) * 2 * np.pi / 12
    rays = 0.19 * np.stack([np.cos(spokes), np.sin(spokes)], 1)
    layers = ((-1.0, -0.2, 0.7, 0.6), (-0.2, 0.45, 0.88, 0.75), (0.45, 1.0, 1.0, 0.95))
    for low, high, lit, veil in layers:  # from the back to the front
        side = ball[(depth >= low) & (depth < high)]
        ends = side @ pose.T + centre
        foot = np.broadcast_to(centre, ends.shape)
        canvas.lines(np.concatenate([foot, ends], 1), 0.004, colours.deep * lit, 0.35)
        reach = rng.uniform(0.8, 1.15, (len(side), 1, 1))
        tufts = (side[:, None] + rays * reach) @ pose.T + centre
        hub = np.broadcast_to(ends[:, None], tufts.shape)
        tone = mix(colours.petal, colours.pale, lit - 0.5) * lit
        canvas.lines(np.concatenate([hub, tufts], 2).reshape(-1, 4), 0.0045, tone, veil)
        canvas.dots(ends, np.full(len(ends), 0.0055), colours.deep * (0.8 * lit), veil)
    _disc(canvas, colours, centre, pose, 0.12)


def _haze(canvas: Canvas, colours: Palette, centre: Array, pose: Array) -> None:
    """The soft ball of light that a dandelion's hairs make together."""
    t = np.linspace(0, 2 * np.pi, 48)
    for reach in (1.0, 0.92, 0.8, 0.6):
        rim = (np.stack([np.cos(t), np.sin(t)], axis=1) * reach) @ pose.T + centre
        canvas.lay(rim, mix(colours.petal, colours.pale, 0.5), opacity=0.1)


# --- flowers seen from the side ----------------------------------------------------------------


def _tulip(canvas: Canvas, rng: Rng, colours: Palette) -> None:
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
    """One hanging bell: a waisted cup with curled lobes; `frame` takes (down, across) to (x, y)."""
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


def _bluebell(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    way = rng.choice([-1.0, 1.0])
    foot = np.array([0.5 - way * rng.uniform(0.1, 0.3), 1.1], np.float32)
    peak = np.array([0.5 + rng.uniform(-0.12, 0.12), rng.uniform(0.08, 0.2)], np.float32)
    nod = peak + np.array([way * rng.uniform(0.2, 0.32), rng.uniform(0.08, 0.22)], np.float32)
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


def _lavender(canvas: Canvas, rng: Rng, colours: Palette) -> None:
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
    """Whorls of small florets along `path` [n, 2], smaller towards its end."""
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


_SPECIES: dict[str, Callable[[Canvas, Rng, Palette], None]] = {
    "bluebell": _bluebell,
    "buttercup": _buttercup,
    "daisy": _daisy,
    "dandelion": _dandelion,
    "dogwood": _dogwood,
    "lavender": _lavender,
    "lily": _lily,
    "sunflower": _sunflower,
    "trillium": _trillium,
    "tulip": _tulip,
}
CLASSES: tuple[str, ...] = tuple(_SPECIES)
