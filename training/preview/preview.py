"""Implement `fledge preview`: report on a data set, or draw random augmentations of one photo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from serving.errors import DataError, ImageError
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from serving.terminal import quote_path
from serving.utils.files import check_folder
from training.config.schema import Recipe
from training.config.sections import AugmentConfig
from training.data import similar_classes
from training.data.dataset import Dataset, load_dataset
from training.data.splits import PARTS
from training.preview import figure, near_copies, photo_hints, photo_sheet
from training.preview.scan import (
    UNLABELLED,
    PhotoStats,
    duplicates,
    scan_photos,
    unusual_photos,
)

PICTURE: Final = "preview.png"
PHOTOS: Final = "photos.png"
AUGMENTED: Final = "augment.png"

EDGES: Final = (0, 64, 128, 224, 320, 480, 640, 1024, 2048, 4096)
"""Lower bounds of the bars in the text histogram of short sides, in pixels."""
_BAR: Final = 40
"""Characters of the longest bar."""
_SHOWN: Final = 5
"""Photos listed under a heading."""


def preview(
    source: str, recipe: Recipe, out: Path, *, split: Path | None = None, command: str = ""
) -> Iterator[str]:
    """Read every photo of `source`, write `out`/preview.png, and yield the lines of the report.

    Args:
        source: Value of `--data`; see `load_dataset`.
        recipe: Recipe with the options of [data], the seed and the image size.
        out: Folder of the picture; it is created if missing.
        split: Value of `--split`; see `load_dataset`.
        command: Command that trains on the data set, for hints; "": `fledge train quick`.

    Raises:
        DataError: `load_dataset` can't read the data set. Photos that can't be read are listed in
            the report instead.
    """
    check_folder(out)
    # What training refuses, such as a class of one photo, is shown, with a hint.
    try:
        dataset = load_dataset(
            source, split=split, config=recipe.data, seed=recipe.seed, trainable=False
        )
    except DataError as error:
        yield from (line for note in getattr(error, "__notes__", ()) for line in note.split("\n"))
        raise
    yield from dataset.reading.tree
    yield from dataset.reading.lines()
    photos = scan_photos(dataset)
    out.mkdir(parents=True, exist_ok=True)
    figure.draw(photos, dataset.classes, out / PICTURE)
    sheet = photo_sheet.rows(photos, dataset.classes, recipe.preprocess, recipe.seed)
    photo_sheet.draw(sheet, dataset.root, recipe.preprocess, out / PHOTOS)
    yield from report(dataset, photos, recipe.preprocess, command)
    if recipe.data.similar == "refuse":
        yield from similar_classes.hints(dataset.classes)
    yield f"photos of each class, and unusual ones: {out / PHOTOS}"
    yield f"counts and sizes: {out / PICTURE}"


def augmented(
    source: str, recipe: Recipe, out: Path, *, split: Path | None = None, photo: Path | None = None
) -> Path:
    """Write `out`/augment.png, with many random augmentations of one photo, and return its path.

    Args:
        source: Value of `--data`; see `load_dataset`. It is not used if `photo` is given.
        recipe: Recipe with the augmentation, the preprocessing and `data.presize`.
        out: Folder of the picture; it is created if missing.
        split: Value of `--split`; see `load_dataset`.
        photo: Path of the photo; None: the first training photo that can be read.

    Raises:
        DataError: The photo can't be read, or `load_dataset` can't read the data set.
    """
    from training.preview import augmentation_sheet

    check_folder(out)
    if photo is None:
        dataset = load_dataset(
            source, split=split, config=recipe.data, seed=recipe.seed, trainable=False
        )
        photo = next((path for path, _ in dataset.train if not _read_error(path, recipe)), None)
        if photo is None:
            raise DataError(f"none of the {len(dataset.train)} photos to train on can be read")
    elif error := _read_error(photo, recipe):
        raise DataError(f"--photo {photo}: {error}")
    out.mkdir(parents=True, exist_ok=True)
    augment: AugmentConfig = recipe.augment
    augmentation_sheet.write(
        photo, augment, recipe.preprocess, recipe.data.presize, out / AUGMENTED, seed=recipe.seed
    )
    return out / AUGMENTED


def _read_error(photo: Path, recipe: Recipe) -> str:
    try:
        decode.read(photo, preprocess=recipe.preprocess)
    except ImageError as error:
        return str(error)
    return ""


def report(
    dataset: Dataset, photos: Sequence[PhotoStats], preprocess: Preprocess, command: str = ""
) -> Iterator[str]:
    """Yield the lines of the report on a data set.

    Args:
        dataset: The data set.
        photos: Statistics of all photos of the data set.
        preprocess: Preprocessing that training will use.
        command: Command that trains on the data set, for hints; "": `fledge train quick`.
    """
    command = command or f"fledge train quick --data {quote_path(dataset.source)}"
    total = sum(photo.size for photo in photos)
    count = f"{len(dataset.classes)} classes, {len(photos)} photos"
    yield f"{dataset.source}: {count}, {total / 1e6:.1f} MB"
    yield ""
    yield from _counts(photos, dataset.classes)
    readable = [photo for photo in photos if not photo.error]
    if readable:
        yield ""
        yield from _sizes([photo.short for photo in readable])
    yield ""
    yield "smallest files"
    for photo in sorted(photos, key=lambda photo: photo.size)[:_SHOWN]:
        yield _line(photo, dataset.root)
    for name, found in unusual_photos(photos):
        yield ""
        yield from _some(f"{name}: {len(found)}", (_line(photo, dataset.root) for photo in found))
    groups = duplicates(photos)
    if groups:
        yield ""
        pairs = (
            "  "
            + " = ".join(f"{_name(photo, dataset.root)} ({photo.part})" for photo in group[:_SHOWN])
            + (f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else "")
            for group in groups
        )
        yield from _some(f"exact duplicates: {len(groups)}", pairs)
    yield ""
    lines = list(near_copies.hints(photos, dataset.root, dataset.reading.given))
    lines += photo_hints.hints(photos, dataset.classes, preprocess, command)
    lines += [
        f"the folder {name} is empty: the model will have no such class"
        for name in dataset.reading.empty
    ]
    yield from (f"hint: {_plain(line)}" for line in lines)
    if not lines:
        yield "no problems found"


def _counts(photos: Sequence[PhotoStats], classes: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table: number of photos by class and split (train, valid or test)."""
    counts = Counter((photo.label, photo.part) for photo in photos)
    totals = Counter(photo.part for photo in photos)
    parts = [part for part in (*PARTS, UNLABELLED) if totals[part]]
    rows = [(name, [counts[name, part] for part in parts]) for name in classes]
    if totals[UNLABELLED]:
        rows.append(("(no label)", [counts["", part] for part in parts]))
    rows.append(("all", [totals[part] for part in parts]))
    cells = [["class", *parts, "all"]]
    cells += [[_plain(name), *map(str, row), str(sum(row))] for name, row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for first, *rest in cells:
        yield "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
    sums = [sum(counts[name, part] for part in PARTS) for name in classes]
    if len(sums) > 1:
        ratio = max(sums) / max(min(sums), 1)
        yield f"the largest class has {ratio:.1f} times as many as the smallest"


def _sizes(shorts: Sequence[int]) -> Iterator[str]:
    """Yield the lines of a histogram of short sides, without empty bars at both ends."""
    ends = [*EDGES[1:], float("inf")]
    bars = [
        sum(low <= short < high for short in shorts) for low, high in zip(EDGES, ends, strict=True)
    ]
    used = [i for i, bar in enumerate(bars) if bar]
    yield "short side in pixels"
    for i in range(used[0], used[-1] + 1):
        name = f"{EDGES[i]}-{EDGES[i + 1] - 1}" if i + 1 < len(EDGES) else f"{EDGES[i]} and more"
        bar = "█" * -(-_BAR * bars[i] // max(bars))
        yield f"  {name:<14}{bars[i]:>6}  {bar}".rstrip()


def _some(title: str, lines: Iterable[str]) -> Iterator[str]:
    items = list(lines)
    yield title
    yield from items[:_SHOWN]
    if len(items) > _SHOWN:
        yield f"  and {len(items) - _SHOWN} more"


def _line(photo: PhotoStats, root: Path) -> str:
    what = photo.error or f"{photo.width} x {photo.height} {photo.mode}"
    return f"  {_name(photo, root)}  {photo.size / 1e3:.1f} kB  {what}"


def _name(photo: PhotoStats, root: Path) -> str:
    return _plain(str(photo.path.relative_to(root)))


def _plain(text: str) -> str:
    """Replace line breaks and other characters that a terminal can't print."""
    return "".join(c if c.isprintable() else "�" for c in text)
