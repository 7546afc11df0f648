"""What a data set is made of, before anything is trained: counts, sizes, strange files, hints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from serving.errors import DataError, ImageError
from serving.imaging import decode
from serving.utils.files import check_folder
from training.config.schema import Recipe
from training.config.sections import AugmentConfig
from training.data import layouts, torchvision_sets
from training.data.dataset import Dataset, load_dataset
from training.data.splits import PARTS
from training.preview import figure
from training.preview.scan import UNLABELLED, PhotoStats, duplicates, hints, oddities, survey

PICTURE: Final = "preview.png"
AUGMENTED: Final = "augment.png"

DEFAULTS: Final = 'name = "preview"\narch = "resnet18"\n[[stage]]\nname = "all"\n'
"""A recipe with nothing but defaults where it counts here."""

EDGES: Final = (0, 64, 128, 224, 320, 480, 640, 1024, 2048, 4096)
"""Of the text histogram of short sides, in pixels; the last bar has no upper end."""
_BAR: Final = 40
_SHOWN: Final = 5


def preview(source: str, recipe: Recipe, out: Path, *, split: Path | None = None) -> Iterator[str]:
    """Look at every photo of `source`; yields the lines of the report, writes `out`/preview.png.

    Args:
        source: As `load_dataset`.
        recipe: Its data section, seed and image size count.
        out: Folder of the picture, made where it is not there.
        split: As `load_dataset`.

    Raises:
        DataError: As `load_dataset`; photos that can't be read are part of the report.
    """
    check_folder(out)
    dataset = load_dataset(source, split=split, config=recipe.data, seed=recipe.seed)
    looks = survey(dataset)
    out.mkdir(parents=True, exist_ok=True)
    figure.draw(looks, dataset.classes, out / PICTURE)
    by_folder = not (recipe.data.csv or recipe.data.pattern or source in torchvision_sets.NAMES)
    bare = layouts.empty_class_folders(dataset.root) if by_folder else []
    yield from report(dataset, looks, recipe.preprocess.size, bare)
    yield f"picture: {out / PICTURE}"


def augmented(
    source: str, recipe: Recipe, out: Path, *, split: Path | None = None, photo: Path | None = None
) -> Path:
    """Write `out`/augment.png: one photo as training will see it, in many draws.

    Args:
        source: As `load_dataset`; not looked at where `photo` is given.
        recipe: Its augmentation, preprocessing and presizing.
        out: Folder of the picture, made where it is not there.
        split: As `load_dataset`.
        photo: Which; the first one to train on that can be read where not given.

    Raises:
        DataError: The photo can't be read; as `load_dataset`.
    """
    from training.preview import augmentation_sheet

    check_folder(out)
    if photo is None:
        dataset = load_dataset(source, split=split, config=recipe.data, seed=recipe.seed)
        photo = next((path for path, _ in dataset.train if not _why_broken(path)), None)
        if photo is None:
            raise DataError(f"none of the {len(dataset.train)} photos to train on can be read")
    elif why := _why_broken(photo):
        raise DataError(f"--photo {photo}: {why}")
    out.mkdir(parents=True, exist_ok=True)
    augment: AugmentConfig = recipe.augment
    augmentation_sheet.write(
        photo, augment, recipe.preprocess, recipe.data.presize, out / AUGMENTED, seed=recipe.seed
    )
    return out / AUGMENTED


def _why_broken(photo: Path) -> str:
    try:
        decode.read(photo)
    except ImageError as error:
        return str(error)
    return ""


def report(
    dataset: Dataset, looks: Sequence[PhotoStats], size: int, bare: Sequence[str] = ()
) -> Iterator[str]:
    """The lines for a person.

    Args:
        dataset: What was looked at.
        looks: At its photos.
        size: The side that training will use, in pixels.
        bare: Folders of classes without a photo.
    """
    total = sum(look.size for look in looks)
    count = f"{len(dataset.classes)} classes, {len(looks)} photos"
    yield f"{dataset.source}: {count}, {total / 1e6:.1f} MB"
    yield ""
    yield from _counts(looks, dataset.classes)
    fine = [look for look in looks if not look.error]
    if fine:
        yield ""
        yield from _sizes([look.short for look in fine])
    yield ""
    yield "smallest files"
    for look in sorted(looks, key=lambda look: look.size)[:_SHOWN]:
        yield _line(look, dataset.root)
    for name, found in oddities(looks):
        yield ""
        yield from _some(f"{name}: {len(found)}", (_line(look, dataset.root) for look in found))
    groups = duplicates(looks)
    if groups:
        yield ""
        lines = (
            "  "
            + " = ".join(f"{_name(look, dataset.root)} ({look.part})" for look in group[:_SHOWN])
            + (f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else "")
            for group in groups
        )
        yield from _some(f"the very same picture: {len(groups)}", lines)
    yield ""
    told = list(hints(looks, dataset.classes, size))
    told += [f"the folder {name} is empty: no class of that name will be known" for name in bare]
    yield from (f"hint: {_plain(hint)}" for hint in told)
    if not told:
        yield "nothing to mend"


def _counts(looks: Sequence[PhotoStats], classes: Sequence[str]) -> Iterator[str]:
    """The table of photos by class and part."""
    counts = Counter((look.label, look.part) for look in looks)
    every = Counter(look.part for look in looks)
    parts = [part for part in (*PARTS, UNLABELLED) if every[part]]
    rows = [(name, [counts[name, part] for part in parts]) for name in classes]
    if every[UNLABELLED]:
        rows.append(("(no label)", [counts["", part] for part in parts]))
    rows.append(("all", [every[part] for part in parts]))
    cells = [["class", *parts, "all"]]
    cells += [[_plain(name), *map(str, row), str(sum(row))] for name, row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for first, *rest in cells:
        yield "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
    sums = [sum(counts[name, part] for part in PARTS) for name in classes]
    yield f"the largest class has {max(sums) / max(min(sums), 1):.1f} times as many as the smallest"


def _sizes(shorts: Sequence[int]) -> Iterator[str]:
    """A histogram of short sides; empty bars at both ends are left out."""
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
    every = list(lines)
    yield title
    yield from every[:_SHOWN]
    if len(every) > _SHOWN:
        yield f"  and {len(every) - _SHOWN} more"


def _line(look: PhotoStats, root: Path) -> str:
    what = look.error or f"{look.width} x {look.height} {look.mode}"
    return f"  {_name(look, root)}  {look.size / 1e3:.1f} kB  {what}"


def _name(look: PhotoStats, root: Path) -> str:
    return _plain(str(look.path.relative_to(root)))


def _plain(text: str) -> str:
    """Names may hold line breaks, and bytes that no terminal takes."""
    return "".join(c if c.isprintable() else "�" for c in text)
