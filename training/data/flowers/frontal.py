"""Draw the classes of flowers that are seen from the front: petals around a centre."""

from __future__ import annotations

import numpy as np

from training.data.flowers.brush import Array, Canvas, Rng, bow, mix, turn
from training.data.flowers.petals import Palette, Petal, lay_petal, lay_stem

_GOLDEN = np.pi * (3 - np.sqrt(5))


def _pose(rng: Rng) -> tuple[Array, Array]:
    """Return a random centre [2] and a random matrix [2, 2] that scales and tilts a unit circle."""
    radius = rng.uniform(0.31, 0.43)
    slack = max(0.5 - radius, 0.06)
    centre = 0.5 + rng.uniform(-slack, slack, 2)
    tilt = turn(rng.uniform(0, np.pi))
    squash = np.diag([1.0, rng.uniform(0.82, 1.0)])
    return centre.astype(np.float32), (tilt @ squash @ tilt.T * radius).astype(np.float32)


def _stem(canvas: Canvas, rng: Rng, colours: Palette, top: Array) -> None:
    """With probability 0.85, draw a stem from `top` to below the picture, with 0 to 2 leaves."""
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
    """Draw a ring of `count` petals around `centre`, with small random differences.

    Args:
        canvas: The canvas to draw on.
        rng: Random generator.
        colours: Colours of the picture.
        petal: Shape of the petals.
        count: Number of petals.
        centre: Centre of the ring [2].
        pose: Matrix [2, 2] that scales and tilts the ring.
        reach: Length of the petals as a multiple of the flower's radius.
        phase: Angle of the first petal in radians.
        lit: Brightness factor.
        loose: Amount of the random differences.
        leaf: Whether to use the leaf colours.
    """
    step = 2 * np.pi / count
    for i in range(count):
        angle = phase + step * (i + rng.normal(0, loose * 0.5))
        length = reach * (1 + rng.normal(0, loose * 0.5))
        frame = (pose @ turn(angle) * length).astype(np.float32)
        tone = lit * (1 + rng.normal(0, 0.04))
        lay_petal(canvas, rng, colours, petal, centre, frame, lit=tone, leaf=leaf)


def _disc(canvas: Canvas, colours: Palette, centre: Array, pose: Array, reach: float) -> None:
    """Draw a domed disc at the centre of a flower, with seeds on a golden-angle spiral."""
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
    """Draw stamens: `count` lines from the centre with a dot of pollen at the end."""
    angle = np.arange(count) * 2 * np.pi / count + rng.normal(0, 0.15, count)
    length = reach * rng.uniform(0.75, 1.1, count)
    ends = (np.stack([np.cos(angle), np.sin(angle)], 1) * length[:, None]) @ pose.T + centre
    foot = np.broadcast_to(centre, ends.shape)
    thread = mix(colours.heart, colours.pale, 0.5)
    canvas.lines(np.concatenate([foot, ends], 1).astype(np.float32), 0.007, thread, 0.9)
    grain = np.full(count, 0.011, np.float32)
    canvas.dots((ends + 0.004).astype(np.float32), grain, colours.heart * 0.45, 0.7)
    canvas.dots(ends.astype(np.float32), grain, colours.heart)


def daisy(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a daisy: two rings of 15 to 21 narrow petals around a small disc."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    count, start = int(rng.integers(15, 22)), rng.uniform(0, 6)
    petal = Petal(rng.uniform(0.085, 0.11), 0.42, 0.3, veins=2)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start + 0.2, lit=0.82)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start, reach=0.94)
    _disc(canvas, colours, centre, pose, rng.uniform(0.2, 0.27))


def sunflower(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a sunflower: two rings of 15 to 19 broad pointed petals around a large disc."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    count, start = int(rng.integers(15, 20)), rng.uniform(0, 6)
    petal = Petal(rng.uniform(0.12, 0.15), 0.8, 0.75, veins=3)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start + 0.2, lit=0.78)
    _whorl(canvas, rng, colours, petal, count, centre, pose, phase=start, reach=0.93)
    _disc(canvas, colours, centre, pose, rng.uniform(0.46, 0.54))


def trillium(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a trillium: three broad petals and three green sepals between the petals."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    start = rng.uniform(0, 6)
    sepal = Petal(0.15, 0.7, 0.9, veins=5)
    _whorl(
        canvas, rng, colours, sepal, 3, centre, pose, phase=start + np.pi / 3, reach=0.85, leaf=True
    )
    petal = Petal(rng.uniform(0.36, 0.43), 0.62, 0.7, ruffle=0.05, veins=7)
    _whorl(canvas, rng, colours, petal, 3, centre, pose, phase=start)
    _stamens(canvas, rng, colours, centre, pose, 6, 0.2)


def dogwood(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a dogwood: four notched petals around a small disc."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    petal = Petal(rng.uniform(0.38, 0.44), 0.75, 0.33, notch=rng.uniform(0.14, 0.2), veins=7)
    _whorl(canvas, rng, colours, petal, 4, centre, pose, phase=rng.uniform(0, 6), loose=0.06)
    _disc(canvas, colours, centre, pose, rng.uniform(0.12, 0.16))


def buttercup(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a buttercup: five round petals around a ring of stamens."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    petal = Petal(rng.uniform(0.44, 0.5), 0.6, 0.3, veins=6)
    _whorl(canvas, rng, colours, petal, 5, centre, pose, phase=rng.uniform(0, 6), loose=0.06)
    _stamens(canvas, rng, colours, centre, pose, 17, 0.3)
    _disc(canvas, colours, centre, pose, 0.14)


def lily(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a lily: two rings of three pointed, spotted petals, and six long stamens."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    start = rng.uniform(0, 6)
    petal = Petal(rng.uniform(0.16, 0.2), 0.6, 0.85, ruffle=0.04, veins=4, spots=True)
    for phase, lit in ((start + np.pi / 3, 0.86), (start, 1.0)):
        _whorl(canvas, rng, colours, petal, 3, centre, pose, reach=1.1, phase=phase, lit=lit)
    _stamens(canvas, rng, colours, centre, pose, 6, 0.5)


def dandelion(canvas: Canvas, rng: Rng, colours: Palette) -> None:
    """Draw a dandelion: a ball of 84 thin lines that end in tufts."""
    centre, pose = _pose(rng)
    _stem(canvas, rng, colours, centre)
    _haze(canvas, colours, centre, pose)
    count = 84
    i = np.arange(count) + 0.5
    depth = 1 - 1.7 * i / count  # 1 at the pole towards the viewer, -0.7 at the back
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
    """Draw translucent discs that look like the many fine hairs of a dandelion."""
    t = np.linspace(0, 2 * np.pi, 48)
    for reach in (1.0, 0.92, 0.8, 0.6):
        rim = (np.stack([np.cos(t), np.sin(t)], axis=1) * reach) @ pose.T + centre
        canvas.lay(rim, mix(colours.petal, colours.pale, 0.5), opacity=0.1)
