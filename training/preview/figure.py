"""Draw the PNG of `fledge preview`: photos per class, widths and heights, lengths of sides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL.PngImagePlugin import PngInfo

from serving.inputs.file_kinds import SOFTWARE
from serving.utils.files import atomic_write
from training.preview.scan import UNLABELLED, PhotoStats

COLOURS: Final = {
    "train": "#33658a",
    "valid": "#f6ae2d",
    "test": "#2a9d3a",
    UNLABELLED: "#9a9a9a",
}
_NAMED: Final = 120  # the names of more classes would overlap


def png_info() -> PngInfo:
    """Return the text by which Fledge's searches of folders recognise its own pictures."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    return info


def draw(photos: Sequence[PhotoStats], classes: Sequence[str], path: Path) -> None:
    """Write a PNG with three plots about the photos of a data set.

    The plots show the number of photos by class and split (train, valid or test), width against
    height, and histograms of the lengths of short and long sides.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = min(len(classes), _NAMED)
    figure = Figure(figsize=(11, max(7.0, 2 + 0.2 * rows)), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 3))
    readable = [photo for photo in photos if not photo.error]
    _bars(figure.add_subplot(grid[:, 0]), photos, classes)
    _scatter(figure.add_subplot(grid[0, 1]), readable)
    _histogram(figure.add_subplot(grid[1, 1]), readable)
    parts = [part for part in COLOURS if any(photo.part == part for photo in photos)]
    patches = [Patch(color=COLOURS[part], label=part) for part in parts]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": SOFTWARE})


def _bars(axes: Any, photos: Sequence[PhotoStats], classes: Sequence[str]) -> None:
    """Plot the number of photos per class as stacked bars, with the first class at the top."""
    counts = Counter((photo.label, photo.part) for photo in photos)
    left = np.zeros(len(classes), np.int64)
    for part in ("train", "valid", "test"):
        widths = np.array([counts[name, part] for name in classes])
        if widths.any():
            axes.barh(range(len(classes)), widths, left=left, color=COLOURS[part])
        left += widths
    names = classes if len(classes) <= _NAMED else []
    axes.set_yticks(range(len(names)), [_short(name, i) for i, name in enumerate(names)])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    if len(classes) <= 40:
        for row, count in enumerate(left):
            axes.text(count, row, f" {count}", va="center", fontsize=8)
    middle, half = (len(classes) - 1) / 2, max(len(classes), 5) / 2
    axes.set_ylim(middle + half, middle - half)
    axes.set_xlim(0, 1.1 * max(left.max(), 1))
    axes.set(title="photos a class", xlabel="photos")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _scatter(axes: Any, photos: Sequence[PhotoStats]) -> None:
    for part, colour in COLOURS.items():
        sizes = Counter((photo.width, photo.height) for photo in photos if photo.part == part)
        if sizes:
            width, height = zip(*sizes, strict=True)
            area = 12 + 3 * np.sqrt(list(sizes.values()))
            axes.scatter(width, height, s=area, c=colour, alpha=0.5, lw=0)
    low, high = _range(photos)
    if _is_wide(low, high):
        axes.set(xscale="log", yscale="log")
        limits = (0.8 * low, 1.25 * high)
    else:
        limits = (0, 1.05 * high)
    small = limits[0] and low
    outside = sum(photo.short < small or max(photo.width, photo.height) > high for photo in photos)
    title = f"size of the photos ({outside} outside)" if outside else "size of the photos"
    axes.set(title=title, xlabel="width in pixels", ylabel="height in pixels")
    axes.set(xlim=limits, ylim=limits, box_aspect=1)
    axes.grid(alpha=0.3)


def _histogram(axes: Any, photos: Sequence[PhotoStats]) -> None:
    low, high = _range(photos)
    bins = np.geomspace(low, high, 41) if _is_wide(low, high) else np.linspace(0, high, 41)
    axes.set_xscale("log" if _is_wide(low, high) else "linear")
    long = [max(photo.width, photo.height) for photo in photos]
    axes.hist([photo.short for photo in photos], bins=bins, color="#4a4a4a", label="short")
    axes.hist(long, bins=bins, histtype="step", color="#d1495b", lw=1.5, label="long")
    axes.set_title("short and long sides", loc="left")
    axes.set(xlabel="pixels", ylabel="photos")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _range(photos: Sequence[PhotoStats]) -> tuple[int, int]:
    """Return the smallest and largest side for the axes, without outliers.

    Outliers are up to 1 % of the photos, if they differ from the rest by more than a factor of 2.
    """
    short = sorted(photo.short for photo in photos) or [1]
    long = sorted(max(photo.width, photo.height) for photo in photos) or [1]
    left_out = 1 + math.ceil(len(short) / 100) if len(short) >= 10 else 0
    low, high = short[left_out], long[-1 - left_out]
    return next(s for s in short if 2 * s >= low), next(s for s in long[::-1] if s <= 2 * high)


def _is_wide(low: int, high: int) -> bool:
    """Whether the range needs a logarithmic axis.

    On a linear axis, most photos would be in one corner of the plot.
    """
    return high > 8 * low


def _short(name: str, number: int) -> str:
    """Return a class's name, cut to 28 characters.

    If the font lacks a character of the name, the class's number (from 1) is returned instead.
    """
    plain = "".join(c if c.isprintable() else "�" for c in name)
    if not all(_glyphs().get_char_index(ord(c)) for c in plain):
        return f"no. {number + 1}"
    return plain if len(plain) <= 28 else plain[:27] + "…"


@cache
def _glyphs() -> Any:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties()))
