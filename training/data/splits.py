"""Assign photos to the splits train, valid and test: at random, by folds, or from a CSV file."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Final, TypeGuard

from serving.errors import DataError, OptionError
from serving.tables.columns import PARTS as FOLDS
from serving.tables.columns import find_paths, text_of, usual_columns
from serving.tables.reader import EmptyTable, Table, limited_rows, open_table
from serving.utils.mistakes import Mistakes
from training.config.sections import DataConfig
from training.data import photo_names
from training.data.folders.part_names import part_of
from training.data.grouped_splits import (
    check_groups,
    classes_of_one_group,
    group_names,
    grouped_folds,
    grouped_holdout,
)
from training.data.layouts import Photo, photos_below
from training.utils.console import quoted

PARTS: Final = ("train", "valid", "test")
_SHOWN: Final = 3
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
        split: Table with the columns `path` and `fold`; fold is train, valid, test or a number.
        config: Data options. Photos of fold number `config.fold` are used for validation, those of
            other numbers for training.
        label_of: Function that maps a photo's path relative to `root` to the photo's label, or to
            "" if the photo has no label.
        class_folders: Whether paths must have the form CLASS/photo.

    Raises:
        DataError: The split file is missing or malformed, or photos are missing or have no label;
            the message has a line for each wrong row.
        OptionError: The split file has no fold `config.fold`, or `config.folds` is set.
    """
    if config.folds:
        raise OptionError(
            f"data.folds = {config.folds}: {split} defines the split; use only one of them"
        )
    rows = _rows(root, split, label_of, class_folders)
    numbers = {int(fold) for _, _, fold in rows if fold.isdecimal()}
    if config.fold not in (numbers or {0}):
        have = f"has folds {', '.join(map(str, sorted(numbers)))}" if numbers else "has no numbers"
        raise OptionError(f"data.fold = {config.fold}: {split} {have}")
    return [Photo(path, label, _part(fold, config.fold)) for path, label, fold in rows]


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
            without `data.folds`; or `data.group` keeps no photos together, or whole classes.
    """
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
        if config.group:
            raise OptionError(
                f"data.group = {config.group!r}: {root} is split already; remove the option"
            )
        return photos
    labels = [photo.label for photo in free]
    too_few = [label for label, count in Counter(labels).items() if count < 2]
    if too_few and trainable:
        raise DataError(
            f"class {quoted(too_few[0])} has one photo; it needs at least 2, "
            "one to train on and one to validate on"
        )
    if config.group:
        groups = _groups(root, free, config)
        if trainable:
            _check_classes(labels, groups, config)
        if config.folds:
            folds = grouped_folds(labels, groups, config.folds, seed)
            held_out = [fold == config.fold for fold in folds]
        else:
            held_out = grouped_holdout(labels, groups, config.valid, seed)
    elif config.folds:
        held_out = [fold == config.fold for fold in stratified_folds(labels, config.folds, seed)]
    else:
        held_out = stratified_holdout(labels, config.valid, seed)
    split = [
        photo._replace(part="valid" if out else "train")
        for photo, out in zip(free, held_out, strict=True)
    ]
    return sorted(split) + [photo for photo in photos if photo.part]


def _groups(root: Path, photos: Sequence[Photo], config: DataConfig) -> list[str]:
    paths = [PurePath(os.path.relpath(photo.path, root)) for photo in photos]
    groups = group_names(paths, config.group)
    check_groups(paths, groups, config.group)
    return groups


def _check_classes(labels: Sequence[str], groups: Sequence[str], config: DataConfig) -> None:
    """Check that the groups leave classes to hold out photos of."""
    single = classes_of_one_group(labels, groups)
    if len(single) == len(set(labels)):
        raise OptionError(
            f"data.group = {quoted(config.group)}: each class is one group, such as "
            f"{quoted(single[0])}, and so can't be split into train and valid; leave the option "
            "out, or give a regular expression of smaller groups"
        )


def group_warning(root: Path, photos: Sequence[Photo], config: DataConfig) -> str:
    """Return a warning about the classes that `data.group` keeps in one part; "" if there are none.

    Args:
        root: Data folder.
        photos: The photos before the split is drawn.
        config: Data options.
    """
    free = [photo for photo in photos if not photo.part]
    if not (config.group and free):
        return ""
    single = classes_of_one_group(
        [photo.label for photo in free], _groups(root, free, config)
    )  # fmt: skip
    if not single:
        return ""
    names = ", ".join(map(quoted, single[:_SHOWN]))
    names += f" and {len(single) - _SHOWN} more" if len(single) > _SHOWN else ""
    what = f"class {names} is one group" if len(single) == 1 else f"{names} are one group each"
    where = "in one fold" if config.folds else "in train, none in valid"
    return f"data.group = {quoted(config.group)}: {what} and so can't be split: all photos {where}"


def _part(fold: str, valid: int) -> str:
    return fold if fold in PARTS else "valid" if int(fold) == valid else "train"


def _rows(
    root: Path, split: Path, label_of: Callable[[str], str], class_folders: bool
) -> list[tuple[Path, str, str]]:
    """Read a split file: (path, label, fold) of every row; fold is a part or a number."""
    table = _open(split)
    folds = [table.columns[at] for at in usual_columns(table.columns, FOLDS)]
    if not table.named and len(table.columns) == 2:
        at = find_paths(table, None, split, str)
        fold_at = 1 - at
    else:
        if not folds or len(table.columns) == 1:
            have = ", ".join(map(quoted, table.columns))
            raise DataError(f"{split}: the first line must be 'path,fold'; it has {have}")
        at = find_paths(table, None, split, lambda _: "call it path")
        fold_at = table.columns.index("fold" if "fold" in folds else folds[0])
    rows = list(limited_rows(table, [at, fold_at]))
    names = [text_of(row.values[0]).strip() for row in rows]
    found = photo_names.locate(names, [root], root, lambda: photos_below(root), split)
    wrong, missing = Mistakes(split), False
    lines: dict[Path, int] = {}
    entries: list[tuple[Path, str, str]] = []
    for row, name, path in zip(rows, names, found, strict=True):
        fold = _fold(text_of(row.values[1]))
        before = wrong.count
        where = table.where(row.number)
        if row.wrong:
            wrong.add(f"{where}: {row.wrong}")
            continue
        if not fold:
            given = text_of(row.values[1]).strip()
            wrong.add(f"{where}: fold {quoted(given)} is not train, valid, test or a number")
        relative = path.relative_to(root) if _is_below(path, root) else Path()
        if isinstance(path, str) and name:
            wrong.add(f"{where}: {path}")
            missing = True
        elif len(relative.parts) < 1 + class_folders:
            form = "CLASS/photo below" if class_folders else "a photo in"
            wrong.add(f"{where}: path {quoted(name)} is not {form} the data folder")
        elif path in lines:
            wrong.add(
                f"{where}: {quoted(name)} is in {table.where(lines[path])}, too; a photo belongs "
                "to one part"
            )
        elif not (label := label_of(relative.as_posix())):
            wrong.add(f"{where}: {quoted(name)} has no label")
        if wrong.count == before and isinstance(path, Path):
            entries.append((path, label, fold))
            lines[path] = row.number
    wrong.check(f"photos are looked for below {root}" if missing else "")
    if not entries:
        raise DataError(f"{split} has no row under its first line; write lines of path,fold")
    return entries


def _open(split: Path) -> Table:
    try:
        return open_table(split)
    except EmptyTable:
        raise DataError(f"{split}: the first line must be 'path,fold'; it has nothing") from None
    except FileNotFoundError:
        raise DataError(f"--split {split}: no such file; make a CSV 'path,fold'") from None
    except IsADirectoryError:
        raise DataError(f"--split {split}: a folder, not a CSV 'path,fold'") from None
    except OSError as error:
        raise DataError(f"--split {split} can't be read: {error.strerror or error}") from error


def _is_below(path: Path | str, root: Path) -> TypeGuard[Path]:
    return isinstance(path, Path) and path.is_relative_to(root)


def _fold(text: str) -> str:
    """Return the part or the number of a fold as it is written in a table; "" if it is neither."""
    fold = text.strip()
    number = re.fullmatch(rf"([0-9]{{1,{_MAX_DIGITS}}})(\.0+)?", fold)
    return number[1] if number else part_of(fold)
