"""Which part every photo belongs to: drawn by share or by folds, or read from a split file."""

from __future__ import annotations

import csv
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from serving.errors import DataError, OptionError
from training.config.sections import DataConfig
from training.data.layouts import Photo
from training.utils.console import MOST, listed, shown

PARTS: Final = ("train", "valid", "test")
_DIGITS: Final = 9  # of a fold's number; Python refuses to read thousands


def stratified(labels: Sequence[str], share: float, seed: int) -> list[bool]:
    """Whether each photo is held out: `share` of every class, at least one, and never all.

    A class is drawn by its own name, so that adding a class leaves the others' draw alone.
    """
    held = [False] * len(labels)
    for order in _shuffled(labels, seed).values():
        count = min(max(1, round(len(order) * share)), len(order) - 1)
        for index in order[:count]:
            held[index] = True
    return held


def folds(labels: Sequence[str], k: int, seed: int) -> list[int]:
    """The fold, 0 to k - 1, of each photo: k shares of every class, equal but for one photo.

    A class is drawn by its own name. The fold it begins at is drawn, too, so that what is left over
    does not always go to the first ones.
    """
    fold = [0] * len(labels)
    for label, order in _shuffled(labels, seed).items():
        first = random.Random(f"{seed}/{label}/first").randrange(k)
        for position, index in enumerate(order):
            fold[index] = (first + position) % k
    return fold


def _shuffled(labels: Sequence[str], seed: int) -> dict[str, list[int]]:
    """The photos of each class, as indices in random order."""
    by_class: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    for label, order in by_class.items():
        random.Random(f"{seed}/{label}").shuffle(order)
    return by_class


def from_file(
    root: Path,
    split: Path,
    config: DataConfig,
    label_of: Callable[[str], str],
    *,
    class_folders: bool,
) -> list[Photo]:
    """The photos that a split file names, each with its label and its part.

    Args:
        root: Of the photos.
        split: CSV `path,fold`; fold is train, valid or test, or a number.
        config: Its fold is the number that is the validation part.
        label_of: Path below `root` -> label, "" where there is none.
        class_folders: Whether a path must have a folder, its class.

    Raises:
        DataError: Not such a file, or photos that are not there.
        OptionError: No such fold in it.
    """
    if config.folds:
        raise OptionError(f"data.folds = {config.folds}: {split} splits already; leave one out")
    rows = _by_file(split, config.fold, class_folders=class_folders)
    photos = [Photo(root / path, label_of(path), part) for path, part in rows]
    gone = [photo.path for photo in photos if not os.path.isfile(photo.path)]
    if gone:
        name = shown(gone[0].relative_to(root))
        raise DataError(f"{split} names {len(gone)} files that are not there, as {name}")
    bare = [photo.path for photo in photos if not photo.label]
    if bare:
        name = shown(bare[0].relative_to(root))
        raise DataError(f"{split} names {len(bare)} photos without a label, as {name}")
    check_names(photo.label for photo in photos)
    return photos


def drawn(root: Path, photos: list[Photo], config: DataConfig, seed: int) -> list[Photo]:
    """The same photos, and a part for each that has none.

    Raises:
        DataError: A class that can't be in both parts.
        OptionError: Folds that don't fit.
    """
    check_names(photo.label for photo in photos)
    free = [photo for photo in photos if not photo.part]
    if not free and config.folds:
        raise OptionError(f"data.folds = {config.folds}: {root} is split already; leave it out")
    if config.fold and not config.folds:
        raise OptionError(f"data.fold = {config.fold}: of what? set data.folds, or give --split")
    if not free:
        return photos
    labels = [photo.label for photo in free]
    lone = [label for label, count in Counter(labels).items() if count < 2]
    if lone:
        raise DataError(
            f"class {shown(lone[0])} has one photo; it needs at least 2, "
            "one to train on and one to validate on"
        )
    if config.folds:
        held = [fold == config.fold for fold in folds(labels, config.folds, seed)]
    else:
        held = stratified(labels, config.valid, seed)
    split = [
        photo._replace(part="valid" if out else "train")
        for photo, out in zip(free, held, strict=True)
    ]
    return sorted(split) + [photo for photo in photos if photo.part]


def _by_file(split: Path, fold: int, *, class_folders: bool) -> list[tuple[str, str]]:
    """(path below the data folder, part) of every row of a split file."""
    rows = _rows(split, class_folders)
    numbers = {int(where) for _, where in rows if where.isdecimal()}
    if fold not in (numbers or {0}):
        have = f"has folds {', '.join(map(str, sorted(numbers)))}" if numbers else "has no numbers"
        raise OptionError(f"data.fold = {fold}: {split} {have}")
    seen: set[Path] = set()
    for path, _ in rows:
        if Path(path) in seen:
            raise DataError(f"{split} names {shown(path)} twice; a photo belongs to one part")
        seen.add(Path(path))
    return [
        (path, where if where in PARTS else "valid" if int(where) == fold else "train")
        for path, where in rows
    ]


def _rows(split: Path, class_folders: bool) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    wrong: list[str] = []
    try:
        # utf-8-sig: spreadsheets write a byte-order mark.
        with split.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
            if not {"path", "fold"} <= set(columns):
                have = ", ".join(map(shown, columns)) or "nothing"
                raise DataError(f"{split}: the first line must be 'path,fold'; it has {have}")
            for row in reader:
                path, fold = ((row[name] or "").strip() for name in ("path", "fold"))
                line = f"line {reader.line_num}"
                if fold not in PARTS and not (fold.isdecimal() and len(fold) <= _DIGITS):
                    wrong.append(
                        f"{line}: fold {shown(fold)} is not train, valid, test or a number"
                    )
                depth = len(Path(path).parts)
                if depth < 1 + class_folders or Path(path).is_absolute() or ".." in path.split("/"):
                    form = "CLASS/photo below" if class_folders else "a photo in"
                    wrong.append(f"{line}: path {shown(path)} is not {form} the data folder")
                rows.append((path, fold))
    except FileNotFoundError:
        raise DataError(f"--split {split}: no such file; make a CSV 'path,fold'") from None
    except IsADirectoryError:
        raise DataError(f"--split {split}: a folder, not a CSV 'path,fold'") from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--split {split} can't be read: {reason}") from error
    if wrong:
        raise DataError(listed(split, wrong, between=", ", most=MOST))
    return rows


def check_names(labels: Iterable[str]) -> None:
    """Refuse names of classes that are no UTF-8.

    Raises:
        DataError: Names the first.
    """
    for name in labels:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"class {shown(name)} is no UTF-8 name; rename it") from None
