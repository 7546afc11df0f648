"""Find the photos of a dataset and their labels in one of the supported layouts on disk.

Labels are the names of class folders (optionally inside `train/`, `valid/` and `test/`), parts of
file names, or values in a CSV table. The result is a list of `Photo`: path, class name and split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from serving.errors import DataError
from serving.imaging.decode import SUFFIXES
from serving.utils.natural_sort import natural_letters_first
from training.config.sections import DataConfig
from training.data.label_table import images_folder, read_label_table
from training.utils.console import quoted

_IGNORED_FOLDERS: Final = ("__MACOSX", "@eaDir")
PART_FOLDERS: Final = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
"""Folder name -> split (train, valid or test). Folders of these names are not classes."""


class Photo(NamedTuple):
    """A labelled photo.

    Attributes:
        path: Path of the file.
        label: Class name.
        part: Split: train, valid or test; "" if the photo is not assigned to a split yet.
    """

    path: Path
    label: str
    part: str = ""


def find_labelled(root: Path, config: DataConfig) -> list[Photo]:
    """Find all labelled photos below `root`.

    Args:
        root: Data folder.
        config: Data options: the label table, or the pattern of file names. By default every class
            has a folder.

    Raises:
        DataError: The layout is wrong or contains no photos, or a file or folder can't be read.
        OptionError: `data.images` is not below `root`.
    """
    if config.csv:
        return _from_table(root, config)
    if config.pattern:
        return _from_names(root, config)
    return _from_folders(root)


def labeller(root: Path, config: DataConfig) -> Callable[[str], str]:
    """Return a function that maps a photo's path relative to `root` to the photo's label.

    The function returns "" for a photo without a label.
    """
    if config.csv:
        labels = {photo.path: photo.label for photo in _from_table(root, config)}
        return lambda path: labels.get(root / path, "")
    if config.pattern:
        return lambda path: _label(config.pattern, Path(path).name)
    has_parts = bool(_parts(root))

    def folder(path: str) -> str:
        first, *rest = Path(path).parts
        return rest[0] if has_parts and first in PART_FOLDERS and len(rest) > 1 else first

    return folder


def find_unlabelled(root: Path, labelled: Iterable[Path], config: DataConfig) -> tuple[Path, ...]:
    """Return the photos in `test/` if none of them has a label and `test/` has no class folders.

    The folder is `root/test`; if `data.pattern` is set, `test` below the folder `data.images`.
    """
    test = (root / config.images if config.pattern else root) / "test"
    if not test.is_dir() or any(path.is_relative_to(test) for path in labelled):
        return ()
    if not (config.csv or config.pattern) and _has_classes(test):
        return ()
    return tuple(photos_below(test))


def photos_below(folder: Path) -> Iterator[Path]:
    """Yield the image files below `folder` in natural order.

    Image files are recognised by their extension. Hidden files and folders are left out.
    """
    if not folder.is_dir():
        return  # a part may lack some classes
    for here, folders, files in os.walk(folder, onerror=_raise_unreadable):
        shown = (folder for folder in folders if not folder.startswith("."))
        folders[:] = sorted(shown, key=natural_letters_first)
        for name in sorted(files, key=natural_letters_first):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(here, name)


def empty_class_folders(root: Path) -> list[str]:
    """Return the class folders without photos in `train/`; in `root` if there is no `train/`."""
    train = _parts(root).get("train", root)
    other = () if train != root else (*PART_FOLDERS, *_IGNORED_FOLDERS)
    empty = [f for f in _class_folders(train) if f.name not in other and not _has_photos(f)]
    return [folder.relative_to(root).as_posix() for folder in empty]


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be read: {error.strerror}") from error


def _from_folders(root: Path) -> list[Photo]:
    parts = _parts(root)
    if not parts:
        return _in_classes(root, "", _class_names(root))
    others = [f for f in _class_folders(root) if f.name not in PART_FOLDERS and _has_photos(f)]
    if others:
        have = ", ".join(f"{folder.name}/" for folder in parts.values())
        name = quoted(f"{others[0].name}/")
        raise DataError(f"{root} has {have} and beside them {name}; move it elsewhere")
    if not {"train", "valid"} <= set(parts):
        missing = "valid" if "train" in parts else "train"
        have = ", ".join(f"{part}/" for part in parts)
        empty = next(
            (n for n, part in PART_FOLDERS.items() if part == missing and (root / n).is_dir()), ""
        )
        if empty:
            what = "contains no folder with photos" if any((root / empty).iterdir()) else "is empty"
            raise DataError(f"{root / empty} {what}; expected {empty}/CLASS/photo.jpg")
        raise DataError(
            f"{root} has {have} but no {missing}/; add it, or put the classes one level up"
        )
    _class_names(parts["train"])
    return [
        photo
        for part, folder in parts.items()
        for photo in _in_classes(folder, part, [f.name for f in _class_folders(folder)])
    ]


def _parts(root: Path) -> dict[str, Path]:
    """Return the folder of each split (train, valid, test) that contains class folders."""
    parts: dict[str, Path] = {}
    for name, part in PART_FOLDERS.items():
        if _has_classes(root / name):
            if part in parts:
                raise DataError(f"{root} has both {parts[part].name}/ and {name}/; keep one")
            parts[part] = root / name
    return parts


def _in_classes(folder: Path, part: str, names: Iterable[str]) -> list[Photo]:
    return [Photo(path, name, part) for name in names for path in photos_below(folder / name)]


def _has_photos(folder: Path) -> bool:
    return any(True for _ in photos_below(folder))


def _has_classes(folder: Path) -> bool:
    return any(_has_photos(inner) for inner in _class_folders(folder))


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    try:
        found = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{root} can't be read: {error.strerror}") from error
    return sorted(found, key=lambda path: natural_letters_first(path.name))


def _class_names(root: Path) -> list[str]:
    folders = _class_folders(root)
    names = [folder.name for folder in folders if _has_photos(folder)]
    if not names:
        raise DataError(
            f"{root} contains no folder with photos; expected {root.name}/CLASS/photo.jpg, "
            "or labels from file names (data.pattern) or from a table (data.csv)"
        )
    for folder in folders:
        empty = folder.name not in names and folder.name not in _IGNORED_FOLDERS
        if empty and any(path.is_file() for path in folder.iterdir()):
            kinds = ", ".join(sorted(SUFFIXES))
            name = quoted(folder.name)
            raise DataError(f"{root}: {name} contains no readable photo ({kinds}); remove it")
    # A flat test/ next to two or more class folders has unlabelled photos; otherwise it is a class.
    if len([name for name in names if name not in PART_FOLDERS]) > 1 and "test" in names:
        names.remove("test")
    return names


def _from_names(root: Path, config: DataConfig) -> list[Photo]:
    """Find photos whose labels are in the file names.

    A `test/` folder is used as the test split. `train/` and `valid/` are used as splits only if
    both exist.
    """
    folder = images_folder(root, config) if config.images else root
    labelled: list[tuple[Path, str]] = []
    unmatched: list[tuple[Path, str]] = []
    for path in photos_below(folder):
        label = _label(config.pattern, path.name)
        (labelled if label else unmatched).append((path, label))
    top = {path: path.relative_to(folder).parts[0] for path, _ in labelled + unmatched}
    parts = {PART_FOLDERS[name] for name in top.values() if name in PART_FOLDERS}
    official = {"train", "valid"} <= parts
    test_unlabelled = not any(top[path] == "test" for path, _ in labelled)
    unmatched = [item for item in unmatched if not (test_unlabelled and top[item[0]] == "test")]
    if unmatched:
        raise DataError(
            f"data.pattern = {config.pattern!r} does not match {len(unmatched)} of {len(top)} "
            f"photos in {folder}, for example {quoted(unmatched[0][0].relative_to(folder))}"
        )
    if not labelled:
        raise DataError(f"{folder} contains no photo for data.pattern = {config.pattern!r}")
    part_of = PART_FOLDERS if official else {"test": "test"}
    return [Photo(path, label, part_of.get(top[path], "")) for path, label in labelled]


def _label(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    return (match.group(1) or "") if match else ""


def _from_table(root: Path, config: DataConfig) -> list[Photo]:
    """Find the photos that a table of labels names; they may lie outside of `root`, see there."""
    parts = PART_FOLDERS
    entries = read_label_table(
        root,
        config,
        photos_below,
        lambda word: parts.get(word, ""),
        anywhere=os.path.isabs(config.csv),
    )
    return [Photo(*entry) for entry in entries]
