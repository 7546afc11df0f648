"""How labels lie on a disk: a folder a class, parts of such, file names, or a table beside photos.

Each layout gives the same thing, photos with the names of their classes; a part stands beside a
photo where its folder decides it.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from serving.errors import DataError, OptionError
from serving.images import SUFFIXES
from training.sections import DataConfig

_CLUTTER: Final = ("__MACOSX", "@eaDir")
FOLDERS: Final = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
"""Folder names that are parts, not classes."""


class Photo(NamedTuple):
    """A photo, the name of its class, and its part: "" where it is still to be drawn."""

    path: Path
    label: str
    part: str = ""


def find(root: Path, config: DataConfig) -> list[Photo]:
    """Every labelled photo of `root`, by the layout that `config` names, or else by folders.

    Raises:
        DataError: Nothing usable there; says what was expected.
    """
    if config.csv:
        return _from_table(root, config)
    if config.pattern:
        return _from_names(root, config)
    return _from_folders(root)


def labeller(root: Path, config: DataConfig) -> Callable[[str], str]:
    """What tells the label of a photo named by its path below `root`; "" where nothing does."""
    if config.csv:
        labels = {path.as_posix(): label for path, label, _ in _table(root, config)}
        return lambda path: labels.get(Path(path).as_posix(), "")
    if config.pattern:
        return lambda path: _label(config.pattern, Path(path).name)
    has_parts = bool(_parts(root))

    def folder(path: str) -> str:
        first, *rest = Path(path).parts
        return rest[0] if has_parts and first in FOLDERS and len(rest) > 1 else first

    return folder


def unlabelled(root: Path, labelled: Iterable[Path], config: DataConfig) -> tuple[Path, ...]:
    """The photos of `test/`, where none of them has a label and no folder of its own."""
    test = root / "test"
    if not test.is_dir() or any(path.is_relative_to(test) for path in labelled):
        return ()
    if not (config.csv or config.pattern) and _has_classes(test):
        return ()
    return tuple(photos_below(test))


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key with numbers by value: 1, 2, 10; the name itself decides between 1 and 01."""
    parts = [t for t in re.split(r"([0-9]+)", name) if t]
    return [(int(t), "") if t.isdecimal() else (-1, t) for t in parts], name


def photos_below(folder: Path) -> Iterator[Path]:
    """Image files below `folder` by extension, hidden ones skipped, in natural order."""
    if not folder.is_dir():
        return  # a part need not have every class
    for here, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural)
        for name in sorted(files, key=natural):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(here, name)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be read: {error.strerror}") from error


def _from_folders(root: Path) -> list[Photo]:
    parts = _parts(root)
    if not parts:
        return _in_classes(root, "", _class_names(root))
    strangers = [f for f in _class_folders(root) if f.name not in FOLDERS and _has_photos(f)]
    if strangers:
        have = ", ".join(f"{folder.name}/" for folder in parts.values())
        raise DataError(f"{root} has {have} and beside them {strangers[0].name}/; move it away")
    if not {"train", "valid"} <= set(parts):
        missing = "valid" if "train" in parts else "train"
        have = ", ".join(f"{part}/" for part in parts)
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
    """The folders that are parts: their photos lie in folders of classes."""
    parts: dict[str, Path] = {}
    for name, part in FOLDERS.items():
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
    return sorted(found, key=lambda path: natural(path.name))


def _class_names(root: Path) -> list[str]:
    folders = _class_folders(root)
    names = [folder.name for folder in folders if _has_photos(folder)]
    if not names:
        raise DataError(f"{root} holds no folder with photos; expected {root.name}/CLASS/photo.jpg")
    for folder in folders:
        bare = folder.name not in names and folder.name not in _CLUTTER
        if bare and any(path.is_file() for path in folder.iterdir()):
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folder} holds no photo that can be read ({kinds}); remove it")
    # A flat test/ beside classes holds photos to be scored; among other parts' names it is a class.
    if len([name for name in names if name not in FOLDERS]) > 1 and "test" in names:
        names.remove("test")
    return names


def _from_names(root: Path, config: DataConfig) -> list[Photo]:
    """Labels from file names. `test/` is a part, as are `train/` and `valid/` where both are."""
    folder = _images(root, config)
    labelled: list[tuple[Path, str]] = []
    strange: list[tuple[Path, str]] = []
    for path in photos_below(folder):
        label = _label(config.pattern, path.name)
        (labelled if label else strange).append((path, label))
    above = {path: path.relative_to(folder).parts[0] for path, _ in labelled + strange}
    parts = {FOLDERS[name] for name in above.values() if name in FOLDERS}
    official = {"train", "valid"} <= parts
    to_score = not any(above[path] == "test" for path, _ in labelled)
    strange = [item for item in strange if not (to_score and above[item[0]] == "test")]
    if strange:
        raise DataError(
            f"data.pattern = {config.pattern!r} does not match {len(strange)} of {len(above)} "
            f"photos in {folder}, as {strange[0][0].relative_to(folder)}"
        )
    if not labelled:
        raise DataError(f"{folder} holds no photo for data.pattern = {config.pattern!r}")
    decides = FOLDERS if official else {"test": "test"}
    return [Photo(path, label, decides.get(above[path], "")) for path, label in labelled]


def _label(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    return (match.group(1) or "") if match else ""


def _images(root: Path, config: DataConfig) -> Path:
    folder = root / config.images
    if Path(config.images).is_absolute() or ".." in Path(config.images).parts:
        raise OptionError(f"data.images = {config.images!r}: name a folder below {root}")
    if not folder.is_dir():
        raise DataError(f"data.images = {config.images!r}: no such folder in {root}")
    return folder


def _from_table(root: Path, config: DataConfig) -> list[Photo]:
    rows = _table(root, config)
    gone = [(path, line) for path, _, line in rows if not (root / path).is_file()]
    if gone:
        path, line = gone[0]
        ends = [s for s in sorted(SUFFIXES) if (root / f"{path}{s}").is_file()]
        remedy = f"set data.suffix = {ends[0]!r}" if ends else "see data.images and data.suffix"
        raise DataError(
            f"{root / config.csv}, line {line}: no photo {path} in {root} "
            f"({len(gone)} of {len(rows)} rows have none); {remedy}"
        )
    return [Photo(root / path, label) for path, label, _ in rows]


def _table(root: Path, config: DataConfig) -> list[tuple[Path, str, int]]:
    """(path below `root`, label, line) of every row of the table of labels."""
    table = root / config.csv
    if config.images or not (root / "train").is_dir():
        images = _images(root, config).relative_to(root)
    else:
        images = Path("train")
    lines: dict[str, tuple[str, int]] = {}
    try:
        # utf-8-sig: spreadsheets write a byte-order mark.
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            have = reader.fieldnames or []
            for column in config.columns:
                if column not in have:
                    raise DataError(
                        f"{table} has no column {column!r}, its first line has "
                        f"{', '.join(map(repr, have)) or 'nothing'}; set data.columns"
                    )
            for row in reader:
                line = f"{table}, line {reader.line_num}"
                name, label = ((row[column] or "").strip() for column in config.columns)
                if not name or Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DataError(f"{line}: {config.columns[0]} {name!r} names no photo")
                if not label:
                    raise DataError(f"{line}: {name} has no {config.columns[1]}")
                if name in lines:
                    raise DataError(f"{line}: {name} stands in line {lines[name][1]}, too")
                lines[name] = label, reader.line_num
    except FileNotFoundError:
        raise DataError(f"data.csv = {config.csv!r}: no such file in {root}") from None
    except UnicodeDecodeError:
        raise DataError(f"{table} is no UTF-8 text; save it as CSV in UTF-8") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{table} can't be read: {error}") from error
    if not lines:
        raise DataError(f"{table} has no row under its first line")
    return [
        (images / f"{name}{config.suffix}", label, line) for name, (label, line) in lines.items()
    ]
