"""Draw the report's charts as SVG. Colours are CSS variables, for light and dark mode."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from training.evaluation.metrics import Calibration, Labels

WIDTH: Final = 360.0
"""Width of a chart in its own units. A phone has about as many pixels, so text is legible there."""

DOTS: Final = 60
"""Curves with more points are drawn without dots."""

_MOST: Final = 1e100  # differences of larger numbers overflow


class Series(NamedTuple):
    """A curve of a line chart.

    points: (x, y) of each point. name: Name in the legend. colour: Name of the CSS variable of its
    colour. width: Stroke width.
    """

    points: Sequence[tuple[float, float]]
    name: str
    colour: str
    width: float = 2.0


def printable(value: str) -> str:
    """Replace control characters by U+FFFD, and bytes that are not UTF-8 by "?"."""
    return re.sub("[\x00-\x1f\x7f-\x9f]", "\ufffd", value.encode("utf-8", "replace").decode())


def text(value: str) -> Markup:
    """Escape a string for SVG elements and attributes, and replace unprintable characters."""
    return escape(printable(value))


def lines(
    curves: Sequence[Series],
    title: str,
    *,
    bounds: Sequence[tuple[float, str]] = (),
    percent: bool = False,
    height: float = 220.0,
) -> Markup:
    """Draw a line chart over epochs.

    Args:
        curves: The curves. Points that are not finite are left out, and with `percent` also points
            outside 0..1.
        title: Text alternative for screen readers.
        bounds: For each stage, the epoch at which the stage ends, and its name.
        percent: Whether y is a fraction of 1 that is shown in percent.
        height: Height of the chart, in the units of `WIDTH`.
    """
    least, most = (0.0, 1.0) if percent else (-_MOST, _MOST)
    curves = [c._replace(points=[p for p in c.points if least <= p[1] <= most]) for c in curves]
    curves = [c for c in curves if c.points]
    ys = [y for curve in curves for _, y in curve.points] or [0.0]
    low, high = min(ys), max(ys)
    pad = (high - low or abs(high) or 1.0) * 0.06
    low = max(0.0, low - pad) if min(ys) >= 0 else low - pad
    high = min(1.0, high + pad) if percent else high + pad
    ends = [x for curve in curves for x, _ in curve.points] + [x for x, _ in bounds]
    end = max(ends, default=0.0)
    left, right, top, bottom = 46.0, WIDTH - 10, 34.0, height - 34

    def across(x: float) -> float:
        return round(left + (right - left) * x / (end or 1), 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - top) * (y - low) / (high - low), 1)

    out = []
    for value in ticks(low, high, 4):
        label = f"{value:.1%}".replace(".0%", "%") if percent else f"{value:g}"
        out.append(f'<path class="grid" d="M{left},{up(value)}H{right}"/>')
        out.append(f'<text class="tick" x="{left - 7}" y="{up(value) + 4}" text-anchor="end">')
        out.append(f"{label}</text>")
    for value in ticks(0, end, 7):
        if value == int(value):
            out.append(f'<text class="tick" x="{across(value)}" y="{bottom + 16}"')
            out.append(f' text-anchor="middle">{value:g}</text>')
    stage_start = across(0)
    for position, name in bounds:
        x = across(position)
        if position < end:
            out.append(f'<path class="bound" d="M{x},{top - 6}V{bottom}"/>')
        if x - stage_start > 7 * len(name):
            out.append(f'<text class="stage" x="{(x + stage_start) / 2:.1f}" y="{top + 2}"')
            out.append(f' text-anchor="middle">{text(name)}</text>')
        stage_start = x
    key = left
    for curve in curves:
        colour = f"var(--{curve.colour})"
        path = " ".join(f"{across(x)},{up(y)}" for x, y in curve.points)
        out.append(f'<polyline class="line" points="{path}" style="stroke:{colour};')
        out.append(f'stroke-width:{curve.width}"/>')
        if len(curve.points) <= DOTS:
            out += [
                f'<circle cx="{across(x)}" cy="{up(y)}" r="2.6" style="fill:{colour}"/>'
                for x, y in curve.points
            ]
        out.append(f'<path d="M{key},12h16" style="stroke:{colour};stroke-width:3"/>')
        out.append(f'<text class="key" x="{key + 21}" y="16">{text(curve.name)}</text>')
        key += 36 + 6.6 * len(curve.name)
    out.append(f'<text class="tick" x="{right}" y="{height - 3}" text-anchor="end">epochs</text>')
    return _svg(out, title, WIDTH, height)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return about `about` round numbers in [low, high].

    They are spaced by 1, 2 or 5 times a power of ten.
    """
    raw = (high - low) / max(about, 1)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def calibration(found: Calibration, title: str, height: float = 260.0) -> Markup:
    """Draw a reliability diagram: the accuracy of each confidence bin, and the diagonal."""
    left, right, top, bottom = 46.0, WIDTH - 10, 14.0, height - 38
    wide, high = right - left, bottom - top
    out = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = bottom - high * value, left + wide * value
        anchor = "end" if value == 1 else "middle"
        out.append(f'<path class="grid" d="M{left},{y}H{right}"/>')
        out.append(f'<text class="tick" x="{left - 7}" y="{y + 4}" text-anchor="end">{value:.0%}')
        out.append(f'</text><text class="tick" x="{x}" y="{bottom + 16}" text-anchor="{anchor}">')
        out.append(f"{value:.0%}</text>")
    for i, photos in enumerate(found.photos):
        if photos:
            x, width = left + wide * found.edges[i], wide * (found.edges[i + 1] - found.edges[i])
            share, confidence = found.accuracy[i], found.confidence[i]
            tip = f"{photos} photos, {confidence:.0%} sure on average, {share:.0%} right"
            out.append(f'<rect class="bar" x="{x + 1:.1f}" y="{bottom - high * share:.1f}"')
            out.append(f' width="{width - 2:.1f}" height="{high * share:.1f}" rx="2"')
            out.append(f' fill-opacity="{0.35 + 0.6 * photos / found.photos.max():.2f}">')
            out.append(f"<title>{tip}</title></rect>")
            out.append(f'<circle class="dot" cx="{left + wide * confidence:.1f}" r="3.2"')
            out.append(f' cy="{bottom - high * share:.1f}"/>')
    out.append(f'<path class="ideal" d="M{left},{bottom}L{right},{top}"/>')
    out.append(f'<text class="tick" x="{right}" y="{height - 3}" text-anchor="end">')
    out.append("how sure it was, and how often it was right</text>")
    return _svg(out, title, WIDTH, height)


def confusion(matrix: Labels, names: Sequence[str], title: str) -> Markup:
    """Draw a confusion matrix, with a row per actual class; the diagonal has another colour."""
    count = len(names)
    short = [name if len(name) <= 14 else f"{name[:7]}…{name[-6:]}" for name in names]
    margin = 14 + 6.2 * max(len(name) for name in short)
    cell = max(17.0, min(36.0, (640 - margin) / count))
    side = margin + cell * count
    rows = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    out = [f'<path class="frame" d="M{margin},{margin}H{side}V{side}H{margin}Z"/>']
    for i, name in enumerate(short):
        y = margin + cell * (i + 0.5)
        full = f"<title>{text(names[i])}</title>{text(name)}"
        out.append(f'<text class="tick" x="{margin - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">')
        out.append(f'{full}</text><text class="tick" transform="translate({y + 4:.1f},')
        out.append(f'{margin - 6:.1f}) rotate(-90)">{full}</text>')
    for i, j in np.argwhere(matrix > 0):
        share = matrix[i, j] / rows[i, 0]
        kind = "hit" if i == j else "miss"
        strength = 0.15 + 0.75 * share if i == j else min(0.95, 0.3 + 1.3 * share)
        x, y = margin + cell * j, margin + cell * i
        what = f"{text(names[i])} taken for {text(names[j])}" if i != j else f"{text(names[i])}"
        out.append(f'<rect class="{kind}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}"')
        out.append(f' height="{cell - 2:.1f}" rx="2" fill-opacity="{strength:.2f}">')
        out.append(f"<title>{what}: {matrix[i, j]}</title></rect>")
        out.append(f'<text class="cell" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}"')
        out.append(f' text-anchor="middle">{matrix[i, j]}</text>')
    return _svg(out, title, side + 2, side + 2, least=0.85 * side, most=1.25 * side)


def intervals(rows: Sequence[tuple[str, float, tuple[float, float]]], title: str) -> Markup:
    """Draw accuracies with their confidence intervals, one per line, on a common scale.

    Args:
        rows: For each line, the name, the accuracy (0 to 1) and the ends of its interval.
        title: Text alternative for screen readers.
    """
    low = min(ends[0] for _, _, ends in rows)
    low = max(0.0, math.floor((low - 0.005) * 50) / 50)
    left, right, height = 96.0, WIDTH - 16, 30.0 * len(rows) + 26

    def at(share: float) -> float:
        return left + (right - left) * (share - low) / (1 - low)

    out = []
    for value in ticks(low, 1.0, 4):
        label = f"{value:.1%}".replace(".0%", "%")
        out.append(f'<path class="grid" d="M{at(value):.1f},6V{height - 20}"/>')
        out.append(f'<text class="tick" x="{at(value):.1f}" y="{height - 5}" text-anchor="middle">')
        out.append(f"{label}</text>")
    for i, (name, share, (least, most)) in enumerate(rows):
        y = 22 + 30.0 * i
        out.append(f'<text class="key" x="{left - 12}" y="{y + 4}" text-anchor="end">')
        out.append(f"{text(name)} {share:.1%}</text>")
        out.append(f'<path class="whisker" d="M{at(least):.1f},{y}H{at(most):.1f}"/>')
        out.append(f'<circle class="mean" cx="{at(share):.1f}" cy="{y}" r="6"/>')
    return _svg(out, title, WIDTH, height)


def _svg(
    parts: Sequence[str],
    title: str,
    width: float,
    height: float,
    least: float = 0,
    most: float = 640,
) -> Markup:
    style = f' style="min-width:{least:.0f}px;max-width:{most:.0f}px"'
    # Everything in `parts` that comes from a user was escaped by `text`.
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{text(title)}"{style}>'
        f"{''.join(parts)}</svg>"
    )
