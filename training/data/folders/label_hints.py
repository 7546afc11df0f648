"""Find out which options read the labels of photos that lie in no class folders.

The labels may be in a table, as Kaggle's competitions have them, or in the names of the files.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from serving.errors import FledgeError
from serving.inputs import archives
from serving.tables.columns import text_of
from serving.tables.reader import open_table
from serving.terminal import quote, quote_path
from training.data.folders.part_names import is_container, part_of
from training.data.folders.photo_tree import PhotoFolder
from training.data.label_table import SUFFIXES

PATTERN: Final = r"^(.*?[^\W\d_].*?)[ ._(-]*[0-9]+\)?\."
"""Finds the label in names such as `cat.0.jpg`, `great_pyrenees_12.jpg` and `cat (1).jpg`.
A label has a letter: `1.jpg` in a folder of test photos has none."""

# fmt: off
_CAMERA: Final = frozenset([
    "img", "image", "photo", "picture", "pic", "dsc", "dscn", "dscf", "dji", "pxl", "mvi", "vid",
    "p", "frame", "screenshot", "scan", "file",
])
# fmt: on
"""Beginnings of names that cameras and tools give, which are no labels."""

_LABELS: Final = ("label", "class", "category", "target", "species", "breed", "name", "labels")
"""Usual names of the column of labels."""

_ROWS: Final = 100
_NAMED: Final = 0.8
"""Share of the rows whose photo must be there."""
_MAX_TABLES: Final = 20


def labels_hint(root: Path, base: PhotoFolder) -> str:
    """Return the options that read the labels of a data folder without class folders; or "".

    Args:
        root: The data folder.
        base: The folder in it in which the photos, or the folders of parts, begin.
    """
    folders = list(_flat_folders(base))
    hints = [*_tables(root, base, folders), *_patterns(base, folders)]
    return hints[0] if hints else ""


def _flat_folders(base: PhotoFolder) -> Iterator[PhotoFolder]:
    """Yield the folders in which photos may lie: train/, images/ or the only one, and `base`."""
    kids = [kid for kid in base.children if part_of(kid.name) == "train"]
    kids += [kid for kid in base.children if is_container(kid.name)]
    kids += [] if kids else base.children[:1] if len(base.children) == 1 else []
    for kid in kids:
        folder = kid
        while not folder.photos and len(folder.children) == 1:
            folder = folder.children[0]
        if folder.photos:
            yield folder
    if base.photos:
        yield base


def _tables(root: Path, base: PhotoFolder, folders: Sequence[PhotoFolder]) -> Iterator[str]:
    """Yield the options for each table that names the photos."""
    try:
        names = sorted(os.listdir(root / base.path))
    except OSError:
        return
    tables = [name for name in names if name.lower().endswith(SUFFIXES)]
    for name in tables[:_MAX_TABLES]:
        rows = _head(root / base.path / name)
        for folder in folders:
            options = _columns(rows, set(folder.photos))
            if options:
                table = f"{base.path}/{name}" if base.path else name
                words = [f"data.csv={table}", *options]
                if folder.path != ("train" if os.path.isdir(root / "train") else ""):
                    words.append(f"data.images={folder.path or '.'}")
                yield f"{name} has a row for each photo: add {' '.join(map(quote, words))}"


def _columns(rows: Sequence[dict[str, str]], photos: set[str]) -> list[str]:
    """Return the options for the columns and the suffix of a table; [] if it names other photos."""
    if not rows:
        return []
    columns = list(rows[0])
    suffixes = Counter(os.path.splitext(name)[1] for name in photos)
    for column in columns:
        for suffix in ("", *(suffix for suffix, _ in suffixes.most_common(3))):
            named = sum(f"{row[column]}{suffix}" in photos for row in rows)
            label = _label_column(columns, column)
            if named >= _NAMED * len(rows) and label:
                options = [f"data.suffix={suffix}"] if suffix else []
                if (column, label) != ("id", "label"):
                    options.append(f"data.columns={json.dumps([column, label])}")
                return options
    return []


def _label_column(columns: Sequence[str], photo: str) -> str:
    others = [column for column in columns if column != photo]
    if len(others) == 1:
        return others[0]
    known = {column.casefold(): column for column in others}
    return next((known[name] for name in _LABELS if name in known), "")


def _head(path: Path) -> list[dict[str, str]]:
    """Return the first rows of a table; [] if it can't be read."""
    try:
        table = open_table(path)
        rows = islice(table.rows(range(len(table.columns))), _ROWS)
        return [
            dict(zip(table.columns, map(text_of, row.values), strict=True))
            for row in rows
            if not row.wrong and len(row.values) == row.fields
        ]
    except (OSError, FledgeError):
        return []


def _patterns(base: PhotoFolder, folders: Sequence[PhotoFolder]) -> Iterator[str]:
    """Yield the options for file names that begin with the label."""
    for folder in folders:
        labels = Counter[str]()
        for name in folder.photos:
            match = re.search(PATTERN, name)
            labels[match[1] if match else ""] += 1
        if "" in labels or not 1 < len(labels) <= len(folder.photos) / 2:
            continue
        if all(label.strip("_- ").casefold() in _CAMERA for label in labels):
            continue
        words = [f"data.pattern={PATTERN}"]
        words += [f"data.images={base.path}"] if base.path else []
        some = ", ".join(f"{label} {number}" for label, number in labels.most_common(3))
        more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
        where = f"in {folder.path}/ " if folder.path else ""
        quoted = " ".join(map(quote, words))
        yield f"the file names {where}begin with labels ({some}{more}): add {quoted}"


def other_files_hint(where: Path, base: PhotoFolder) -> str:
    """Return what a folder without photos holds, and what to do if it holds archives; or "".

    Args:
        where: Path of the folder.
        base: Its content.
    """
    counts = base.suffixes() + base.unread()
    shown = ", ".join(f"{name} {number}" for name, number in counts.most_common(3))
    hint = f"; it has other files: {shown}" if shown else ""
    try:
        names = sorted(
            (name for name in os.listdir(where) if archives.is_archive(name)),
            key=lambda name: (part_of(name.partition(".")[0]) != "train", name),
        )
    except OSError:
        return hint
    if names:
        first = quote_path(where / names[0])
        hint += f"; unpack the archives, or give one: --data {first}"
    return hint
