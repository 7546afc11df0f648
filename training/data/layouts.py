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
from serving.imaging.decode import SUFFIXES
from serving.utils.natural_sort import natural
from training.config.sections import DataConfig
from training.utils.console import MOST, listed, shown

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
    """The photos of `test/`, where none of them has a label and no folder of its own.

    Where file names are the labels, `test/` is looked for where they are: below `data.images`.
    """
    test = (root / config.images if config.pattern else root) / "test"
    if not test.is_dir() or any(path.is_relative_to(test) for path in labelled):
        return ()
    if not (config.csv or config.pattern) and _has_classes(test):
        return ()
    return tuple(photos_below(test))


def photos_below(folder: Path) -> Iterator[Path]:
    """Image files below `folder` by extension, hidden ones skipped, in natural order."""
    if not folder.is_dir():
        return  # a part need not have every class
    for here, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural)
        for name in sorted(files, key=natural):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(here, name)


def bare_classes(root: Path) -> list[str]:
    """Folders below `root`, or below its training part, where a class has not one photo."""
    home = _parts(root).get("train", root)
    known = () if home != root else (*FOLDERS, *_CLUTTER)
    bare = [f for f in _class_folders(home) if f.name not in known and not _has_photos(f)]
    return [folder.relative_to(root).as_posix() for folder in bare]


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be read: {error.strerror}") from error


def _from_folders(root: Path) -> list[Photo]:
    parts = _parts(root)
    if not parts:
        return _in_classes(root, "", _class_names(root))
    strangers = [f for f in _class_folders(root) if f.name not in FOLDERS and _has_photos(f)]
    if strangers:
        have = ", ".join(f"{folder.name}/" for folder in parts.values())
        name = shown(f"{strangers[0].name}/")
        raise DataError(f"{root} has {have} and beside them {name}; move it away")
    if not {"train", "valid"} <= set(parts):
        missing = "valid" if "train" in parts else "train"
        have = ", ".join(f"{part}/" for part in parts)
        bare = next(
            (n for n, part in FOLDERS.items() if part == missing and (root / n).is_dir()), ""
        )
        if bare:
            what = "holds no folder with photos" if any((root / bare).iterdir()) else "is empty"
            raise DataError(f"{root / bare} {what}; expected {bare}/CLASS/photo.jpg")
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
        raise DataError(
            f"{root} holds no folder with photos; expected {root.name}/CLASS/photo.jpg, "
            "or labels from file names (data.pattern) or from a table (data.csv)"
        )
    for folder in folders:
        bare = folder.name not in names and folder.name not in _CLUTTER
        if bare and any(path.is_file() for path in folder.iterdir()):
            kinds = ", ".join(sorted(SUFFIXES))
            name = shown(folder.name)
            raise DataError(f"{root}: {name} holds no photo that can be read ({kinds}); remove it")
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
            f"photos in {folder}, as {shown(strange[0][0].relative_to(folder))}"
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
        raise OptionError(f"data.images = {shown(config.images)}: name a folder below {root}")
    if not os.path.isdir(folder):
        raise DataError(f"data.images = {shown(config.images)}: no such folder in {root}")
    return folder


def _from_table(root: Path, config: DataConfig) -> list[Photo]:
    rows = _table(root, config)
    # os.path, since pathlib raises over names that are too long and folders that are closed.
    gone = [(path, line) for path, _, line in rows if not os.path.isfile(root / path)]
    if gone:
        path, line = gone[0]
        ends = [s for s in sorted(SUFFIXES) if os.path.isfile(root / f"{path}{s}")]
        remedy = f"set data.suffix = {ends[0]!r}" if ends else "see data.images and data.suffix"
        raise DataError(
            f"{root / config.csv}, line {line}: no photo {shown(path)} in {root} "
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
    lines: dict[Path, tuple[str, int]] = {}
    wrong: list[str] = []
    id_column, label_column = config.columns
    try:
        # utf-8-sig: spreadsheets write a byte-order mark.
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            have = reader.fieldnames or []
            for column in config.columns:
                if column not in have:
                    raise DataError(
                        f"{table} has no column {shown(column)}, its first line has "
                        f"{', '.join(map(shown, have)) or 'nothing'}; set data.columns"
                    )
            for row in reader:
                line = f"line {reader.line_num}"
                name, label = ((row[column] or "").strip() for column in config.columns)
                if not name or Path(name).is_absolute() or ".." in Path(name).parts:
                    wrong.append(f"{line}: {id_column} {shown(name)} names no photo")
                    continue
                if not label:
                    wrong.append(f"{line}: {shown(name)} has no {label_column}")
                path = images / f"{name}{config.suffix}"  # 1.jpg and ./1.jpg are one photo
                if path in lines:
                    wrong.append(f"{line}: {shown(name)} stands in line {lines[path][1]}, too")
                lines[path] = label, reader.line_num
    except FileNotFoundError:
        raise DataError(f"data.csv = {shown(config.csv)}: no such file in {root}") from None
    except UnicodeDecodeError:
        raise DataError(f"{table} is no UTF-8 text; save it as CSV in UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.csv = {shown(config.csv)} can't be read: {reason}") from error
    if wrong:
        raise DataError(listed(table, wrong, between=", ", most=MOST))
    if not lines:
        raise DataError(f"{table} has no row under its first line")
    return [(path, label, line) for path, (label, line) in lines.items()]
