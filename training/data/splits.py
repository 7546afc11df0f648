"""Assign photos to the splits train, valid and test: at random, by folds, or from a CSV file."""

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
from training.utils.console import MAX_MISTAKES, format_mistakes, quoted

PARTS: Final = ("train", "valid", "test")
_MAX_DIGITS: Final = 9  # in a fold number, because `int` refuses strings of thousands of digits


def stratified_holdout(labels: Sequence[str], share: float, seed: int) -> list[bool]:
    """Choose at random which photos are held out for validation.

    Every class has its own random generator, seeded by the class name. Adding a class does not
    change the choice in the other classes.

    Args:
        labels: Class name of each photo.
        share: Share of each class to hold out. At least 1 photo of a class is held out, never all.
        seed: Random seed.

    Returns:
        For each photo, whether it is held out.
    """
    held_out = [False] * len(labels)
    for order in _shuffled(labels, seed).values():
        count = min(max(1, round(len(order) * share)), len(order) - 1)
        for index in order[:count]:
            held_out[index] = True
    return held_out


def stratified_folds(labels: Sequence[str], k: int, seed: int) -> list[int]:
    """Assign each photo at random to one of k folds for cross-validation.

    The photos of a class are distributed evenly: fold sizes differ by at most 1. Every class has
    its own random generator, seeded by the class name. Each class starts at a random fold;
    otherwise the left-over photos of every class would land in fold 0.

    Args:
        labels: Class name of each photo.
        k: Number of folds.
        seed: Random seed.

    Returns:
        The fold of each photo, 0 to k - 1.
    """
    fold = [0] * len(labels)
    for label, order in _shuffled(labels, seed).items():
        first = random.Random(f"{seed}/{label}/first").randrange(k)
        for position, index in enumerate(order):
            fold[index] = (first + position) % k
    return fold


def _shuffled(labels: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Return for each class the indices of the class's photos in random order."""
    by_class: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    for label, order in by_class.items():
        random.Random(f"{seed}/{label}").shuffle(order)
    return by_class


def read_split_file(
    root: Path,
    split: Path,
    config: DataConfig,
    label_of: Callable[[str], str],
    *,
    class_folders: bool,
) -> list[Photo]:
    """Read a split file, and return the listed photos with their labels and splits.

    Args:
        root: Data folder.
        split: CSV file with the columns `path` and `fold`; fold is train, valid, test or a number.
        config: Data options. Photos of fold number `config.fold` are used for validation, those of
            other numbers for training.
        label_of: Function that maps a photo's path relative to `root` to the photo's label, or to
            "" if the photo has no label.
        class_folders: Whether paths must have the form CLASS/photo.

    Raises:
        DataError: The split file is missing or malformed, or photos are missing or have no label.
        OptionError: The split file has no fold `config.fold`, or `config.folds` is set.
    """
    if config.folds:
        raise OptionError(
            f"data.folds = {config.folds}: {split} defines the split; use only one of them"
        )
    rows = _parts_of_rows(split, config.fold, class_folders=class_folders)
    photos = [Photo(root / path, label_of(path), part) for path, part in rows]
    missing = [photo.path for photo in photos if not os.path.isfile(photo.path)]
    if missing:
        name = quoted(missing[0].relative_to(root))
        raise DataError(f"{split} lists {len(missing)} missing files, for example {name}")
    unlabelled = [photo.path for photo in photos if not photo.label]
    if unlabelled:
        name = quoted(unlabelled[0].relative_to(root))
        raise DataError(
            f"{split} lists {len(unlabelled)} photos without a label, for example {name}"
        )
    check_class_names(photo.label for photo in photos)
    return photos


def draw_split(
    root: Path, photos: list[Photo], config: DataConfig, seed: int, *, trainable: bool = True
) -> list[Photo]:
    """Assign the photos without a split to train or valid, at random.

    The photo of a class of one, if it is not refused, is in one of them alone.

    Args:
        root: Data folder, for error messages.
        photos: All labelled photos of the dataset.
        config: Data options: share of validation photos, or number of folds.
        seed: Random seed.
        trainable: Whether to refuse a class of one photo.

    Raises:
        DataError: A class has only one photo, but needs one for training and one for validation.
        OptionError: `data.folds` is set, but all photos have a split already; or `data.fold` is set
            without `data.folds`.
    """
    check_class_names(photo.label for photo in photos)
    free = [photo for photo in photos if not photo.part]
    if not free and config.folds:
        raise OptionError(
            f"data.folds = {config.folds}: {root} is split already; remove the option"
        )
    if config.fold and not config.folds:
        raise OptionError(
            f"data.fold = {config.fold} has no effect alone; set data.folds, or give --split"
        )
    if not free:
        return photos
    labels = [photo.label for photo in free]
    too_few = [label for label, count in Counter(labels).items() if count < 2]
    if too_few and trainable:
        raise DataError(
            f"class {quoted(too_few[0])} has one photo; it needs at least 2, "
            "one to train on and one to validate on"
        )
    if config.folds:
        held_out = [fold == config.fold for fold in stratified_folds(labels, config.folds, seed)]
    else:
        held_out = stratified_holdout(labels, config.valid, seed)
    split = [
        photo._replace(part="valid" if out else "train")
        for photo, out in zip(free, held_out, strict=True)
    ]
    return sorted(split) + [photo for photo in photos if photo.part]


def _parts_of_rows(split: Path, fold: int, *, class_folders: bool) -> list[tuple[str, str]]:
    """Read a split file: (path relative to the data folder, split) of every table row.

    fold: Number of the fold that is used for validation.
    """
    rows = _rows(split, class_folders)
    numbers = {int(where) for _, where in rows if where.isdecimal()}
    if fold not in (numbers or {0}):
        have = f"has folds {', '.join(map(str, sorted(numbers)))}" if numbers else "has no numbers"
        raise OptionError(f"data.fold = {fold}: {split} {have}")
    seen: set[Path] = set()
    for path, _ in rows:
        if Path(path) in seen:
            raise DataError(f"{split} lists {quoted(path)} twice; a photo belongs to one part")
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
                have = ", ".join(map(quoted, columns)) or "nothing"
                raise DataError(f"{split}: the first line must be 'path,fold'; it has {have}")
            for row in reader:
                path, fold = ((row[name] or "").strip() for name in ("path", "fold"))
                line = f"line {reader.line_num}"
                if fold not in PARTS and not (fold.isdecimal() and len(fold) <= _MAX_DIGITS):
                    wrong.append(
                        f"{line}: fold {quoted(fold)} is not train, valid, test or a number"
                    )
                depth = len(Path(path).parts)
                if depth < 1 + class_folders or Path(path).is_absolute() or ".." in path.split("/"):
                    form = "CLASS/photo below" if class_folders else "a photo in"
                    wrong.append(f"{line}: path {quoted(path)} is not {form} the data folder")
                rows.append((path, fold))
    except FileNotFoundError:
        raise DataError(f"--split {split}: no such file; make a CSV 'path,fold'") from None
    except IsADirectoryError:
        raise DataError(f"--split {split}: a folder, not a CSV 'path,fold'") from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--split {split} can't be read: {reason}") from error
    if wrong:
        raise DataError(*format_mistakes(split, wrong, between=", ", most=MAX_MISTAKES))
    return rows


def check_class_names(labels: Iterable[str]) -> None:
    """Check that every class name can be encoded as UTF-8.

    Raises:
        DataError: A class name can't be encoded as UTF-8; the message contains the first such name.
    """
    for name in labels:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"class {quoted(name)} is not a UTF-8 name; rename it") from None
