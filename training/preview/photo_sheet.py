"""Draw the photos of a data set as a contact sheet: rows of each class, then unusual photos."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from serving.errors import ImageError
from serving.imaging import decode
from serving.imaging.preprocess import FITS, Preprocess
from serving.utils.cpu import cores
from serving.utils.files import atomic_write
from serving.utils.progress import progress_bar
from training.preview.figure import png_info
from training.preview.scan import LONG, PhotoStats

COLUMNS: Final = 8
TILE: Final = 120  # pixels
GAP: Final = 6
MAX_CLASSES: Final = 40
"""Classes with a row of their own: 40 rows are a picture of about 6,000 pixels."""
FEW: Final = 5
"""Photos of a class below which none of them is called unlike the others."""
_FONT, _SMALL = 15, 11
_INK, _PALE, _PAPER, _MARK, _EMPTY = "#222222", "#777777", "#ffffff", "#c2410c", "#eeeeee"


@dataclass(frozen=True)
class Row:
    """A row of the sheet.

    Attributes:
        title: Text above the photos.
        photos: The photos, at most `COLUMNS`.
        named: Whether the name of the file and of the class stand below each photo.
        framed: Whether a frame shows the part of each photo that validation and the service see.
        fit: Value of `Preprocess.fit` with which the photos are drawn as the network sees them; "":
            they are drawn whole.
    """

    title: str
    photos: Sequence[PhotoStats]
    named: bool = False
    framed: bool = False
    fit: str = ""


def rows(
    photos: Sequence[PhotoStats], classes: Sequence[str], preprocess: Preprocess, seed: int
) -> Iterator[Row]:
    """Yield the rows of the sheet: random photos of each class, then unusual ones of all classes.

    Args:
        photos: Statistics of all photos; those that can't be read are left out.
        classes: Names of the classes.
        preprocess: Preprocessing, of which `crop` and `fit` count.
        seed: Seed of the choice of the photos of a class.
    """
    readable = [photo for photo in photos if not photo.error]
    by_class: dict[str, list[PhotoStats]] = {}
    for photo in photos:
        by_class.setdefault(photo.label, []).append(photo)
    for name in classes[:MAX_CLASSES]:
        every = by_class.get(name, [])
        own = [photo for photo in every if not photo.error]
        chosen = random.Random(f"{seed}/{name}").sample(own, min(COLUMNS, len(own)))
        number = "1 photo" if len(every) == 1 else f"{len(every):,} photos"
        broken = f", {len(every) - len(own)} can't be read" if len(own) < len(every) else ""
        yield Row(f"{name}: {number}{broken}", chosen)
    if len(classes) > MAX_CLASSES:
        yield Row(f"and {len(classes) - MAX_CLASSES} more classes", ())
    strange = most_unlike_class(readable)[:COLUMNS]
    if strange:
        yield Row("least like the other photos of their class", strange, named=True)
    long = [photo for photo in readable if photo.stretch >= LONG / 2]
    long = sorted(long, key=lambda photo: -photo.stretch)[:COLUMNS]
    if long:
        crops = preprocess.fit == "crop"
        title = "longest; framed: what validation and the service see" if crops else "longest"
        yield Row(title, long, named=True, framed=crops)
        for fit in FITS:
            here = ", as in this recipe" if fit == preprocess.fit else ""
            title = f"the same as the network sees them, preprocess.fit={fit}{here}"
            yield Row(title, long, fit=fit)
    edges = [(detail_outside(photo, preprocess.crop), photo) for photo in readable]
    edges = [(share, photo) for share, photo in edges if photo not in long]
    edges.sort(key=lambda item: -item[0])
    if edges and preprocess.fit == "crop":
        title = "most detail outside the frame, which is what validation and the service see"
        yield Row(title, [photo for _, photo in edges[:COLUMNS]], named=True, framed=True)


def most_unlike_class(photos: Sequence[PhotoStats]) -> list[PhotoStats]:
    """Sort photos by how far they are from the other photos of their class, furthest first.

    The distance is that of the thumbnail, reduced to 4 x 4 pixels, to the median of the class,
    divided by the median distance of the class. Classes of fewer than `FEW` photos are left out,
    and so are photos without a class.
    """
    found: list[tuple[float, int]] = []
    by_class: dict[str, list[int]] = {}
    for i, photo in enumerate(photos):
        by_class.setdefault(photo.label, []).append(i)
    for label, own in by_class.items():
        if not label or len(own) < FEW:
            continue
        small = np.stack([photos[i].thumbnail for i in own]).astype(np.float32)
        small = small.reshape(len(own), 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(len(own), -1)
        distance = np.linalg.norm(small - np.median(small, axis=0), axis=1)
        relative = distance / max(float(np.median(distance)), 1.0)
        found += zip(relative.tolist(), own, strict=True)
    return [photos[i] for _, i in sorted(found, key=lambda item: (-item[0], item[1]))]


def detail_outside(photo: PhotoStats, crop: float) -> float:
    """Return the share of a photo's detail that the centre crop cuts off, in [0, 1].

    Detail is the difference between neighbouring pixels of the thumbnail.

    Args:
        photo: Statistics of a photo that can be read.
        crop: `Preprocess.crop`.
    """
    grey = photo.thumbnail.astype(np.float32).mean(axis=2)
    detail = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    left, top, right, bottom = Preprocess(crop=crop).box((0, 0, photo.width, photo.height))
    across = _overlap(left / photo.width, right / photo.width, detail.shape[1])
    down = _overlap(top / photo.height, bottom / photo.height, detail.shape[0])
    total = float(detail.sum())
    return 1 - float(down @ detail @ across) / total if total else 0.0


def _overlap(low: float, high: float, count: int) -> npt.NDArray[np.float32]:
    """Return how much of each of `count` equal parts of [0, 1] is in [low, high]: [count], 0..1."""
    starts = np.arange(count) / count
    inside = np.minimum(starts + 1 / count, high) - np.maximum(starts, low)
    shares: npt.NDArray[np.float32] = np.clip(inside * count, 0, 1).astype(np.float32)
    return shares


def draw(sheet: Iterable[Row], root: Path, preprocess: Preprocess, path: Path) -> None:
    """Write the rows as a PNG.

    Args:
        sheet: The rows.
        root: Data folder, to which the names of files are relative.
        preprocess: Preprocessing: the crop that is framed, and the background.
        path: File to write.
    """
    rows_of_sheet = list(sheet)
    places = [(i, photo) for i, row in enumerate(rows_of_sheet) for photo in row.photos]
    pool = ThreadPoolExecutor(cores())
    try:
        with progress_bar() as bar:
            tiles = pool.map(
                lambda place: _tile(place[1], rows_of_sheet[place[0]], preprocess), places
            )
            drawn = list(bar.track(tiles, total=len(places), description="drawing"))
    finally:
        pool.shutdown(cancel_futures=True)
    canvas = _lay_out(rows_of_sheet, iter(drawn), root)
    with atomic_write(path) as partial:
        canvas.save(partial, format="PNG", pnginfo=png_info())


def _tile(photo: PhotoStats, row: Row, preprocess: Preprocess) -> Image.Image:
    """Return the photo in a square of `TILE` pixels; empty if it can't be read again."""
    tile = Image.new("RGB", (TILE, TILE), _EMPTY)
    seen = replace(preprocess, size=TILE, decode="scaled", fit=row.fit or "pad")
    try:
        read = decode.read(photo.path, preprocess=seen)
    except ImageError:  # changed since the scan
        return tile
    if row.fit:
        tile = Image.fromarray(seen(read.image, read.area))
        ImageDraw.Draw(tile).rectangle((0, 0, TILE - 1, TILE - 1), outline=_EMPTY)  # of the padding
        return tile
    scale = TILE / max(read.size)
    size = (max(round(read.size[0] * scale), 1), max(round(read.size[1] * scale), 1))
    left, top = (TILE - size[0]) // 2, (TILE - size[1]) // 2
    small = read.image.resize(size, Image.Resampling.BOX, box=read.area, reducing_gap=2.0)
    tile.paste(small, (left, top))
    if row.framed:
        box = [scale * side for side in preprocess.box((0, 0, *read.size))]
        first = (left + box[0], top + box[1])  # of a frame, which is at least one pixel
        last = (max(left + box[2] - 1, first[0]), max(top + box[3] - 1, first[1]))
        ImageDraw.Draw(tile).rectangle((*first, *last), outline=_MARK, width=2)
    return tile


def _lay_out(sheet: Sequence[Row], tiles: Iterator[Image.Image], root: Path) -> Image.Image:
    font, small = _font(_FONT), _font(_SMALL)
    line, caption = round(_FONT * 1.5), round(_SMALL * 1.4)
    heights = [
        line + (TILE + GAP if row.photos else 0) + (2 * caption + GAP if row.named else 0)
        for row in sheet
    ]
    step = TILE + GAP
    canvas = Image.new("RGB", (COLUMNS * step + GAP, sum(heights) + 2 * GAP), _PAPER)
    pen, top = ImageDraw.Draw(canvas), GAP
    for row, height in zip(sheet, heights, strict=True):
        pen.text((GAP, top), _fit(row.title, font, canvas.width - 2 * GAP), fill=_INK, font=font)
        for column, photo in enumerate(row.photos):
            left, below = GAP + column * step, top + line + TILE
            canvas.paste(next(tiles), (left, top + line))
            if row.named:
                name = str(photo.path.relative_to(root))
                pen.text((left, below), _fit(photo.label, small, TILE), fill=_INK, font=small)
                where = (left, below + caption)
                pen.text(where, _fit(name, small, TILE, end=True), fill=_PALE, font=small)
        top += height
    return canvas


def _fit(text: str, font: Any, width: int, *, end: bool = False) -> str:
    """Cut a text to `width` pixels, at its start if `end`, with characters that can be drawn."""
    text = "".join(c if c.isprintable() else "�" for c in text)[-500:]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[1:] if end else text[:-1]
    return f"…{text}" if end else f"{text}…"


def _font(size: int) -> Any:
    """Return DejaVu Sans, which matplotlib brings: it has more letters than Pillow's own font."""
    from matplotlib.font_manager import FontProperties, findfont

    return ImageFont.truetype(findfont(FontProperties()), size)
