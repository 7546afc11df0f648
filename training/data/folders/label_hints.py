"""Find out which options read the labels of photos that lie in no class folders.

The labels may be in a table, as Kaggle's competitions have them, or in the names of the files.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Final

from serving.errors import FledgeError
from serving.inputs import archives
from serving.tables.columns import LABELS, likely_labels, text_of, usual_columns
from serving.tables.reader import open_table
from serving.terminal import escape, quote, quote_path
from training.config.sections import DataConfig
from training.data.folders.part_names import is_container, part_of
from training.data.folders.photo_tree import PhotoFolder
from training.data.label_table import read_label_table
from training.data.other_labels import folders_down_to, tables_in

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

_ROWS: Final = 100
_NAMED: Final = 0.8
"""Share of the rows whose photo must be there."""


def labels_hint(root: Path, base: PhotoFolder) -> str:
    """Return the options that read the labels of a data folder without class folders; or "".

    Args:
        root: The data folder.
        base: The folder in it in which the photos, or the folders of parts, begin.
    """
    folders = list(_flat_folders(base))
    tables = [hint for _, hint in sorted(_tables(root, base, folders), key=itemgetter(0))]
    patterns = list(_patterns(base, folders))
    if tables and patterns:
        return f"{tables[0]}; or {patterns[0]}"
    return next(iter([*tables, *patterns]), "")


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


def _tables(
    root: Path, base: PhotoFolder, folders: Sequence[PhotoFolder]
) -> Iterator[tuple[int, str]]:
    """Yield the options, and their number, for each table that names most photos and has labels."""
    photos = [root / path for path in base.below()]
    tests = [kid for kid in base.children if part_of(kid.name) == "test"]
    most = len(photos) - sum(kid.total for kid in tests)
    above = reversed(folders_down_to(base.path))
    for name in tables_in(root, dict.fromkeys([*above, *(folder.path for folder in folders)])):
        for config in _configs(root, name, photos, folders):
            try:
                entries = read_label_table(
                    root, config, lambda _: iter(photos), lambda _: "", checked=False
                )
            except (OSError, FledgeError):
                continue
            named = len({entry.path for entry in entries})
            labels = Counter(entry.label for entry in entries)
            if named <= most / 2 or not 1 < len(labels) <= max(2, named / 2):
                continue
            changed = config.model_dump(exclude_defaults=True, mode="json")
            words = [f"data.csv={changed.pop('csv')}"]
            words += [
                f"data.{key}={value if isinstance(value, str) else _json(value)}"
                for key, value in changed.items()
            ]
            rows = "a row for each photo" if named >= most else f"rows for {named} of {most} photos"
            options = " ".join(map(quote, words))
            yield len(words), f"{name} has {rows} (labels {_shown(labels)}): add {options}"
            break


def _configs(
    root: Path, table: str, photos: Sequence[Path], folders: Sequence[PhotoFolder]
) -> Iterator[DataConfig]:
    """Yield options that may read a table, the fewest first."""
    names = {photo.name.casefold() for photo in photos}
    columns = _columns(root / table, names | {os.path.splitext(name)[0] for name in names})
    for images in ("", *(folder.path or "." for folder in folders)):
        yield DataConfig(csv=table, images=images)
        if columns:
            yield DataConfig(csv=table, images=images, columns=columns)


def _columns(path: Path, photos: Set[str]) -> tuple[str, str] | None:
    """Return the names of the columns that look like those of the photos and the labels."""
    rows = _head(path)
    if not rows:
        return None
    columns = list(rows[0])
    for column in columns:
        names = [re.split(r"[/\\]", row[column].strip())[-1].casefold() for row in rows]
        if sum(name in photos for name in names) < _NAMED * len(rows):
            continue
        others = [at for at, name in enumerate(columns) if name != column]
        usual = [at for at in usual_columns(columns, LABELS) if at in others]
        if others:
            label = usual[0] if usual else likely_labels(open_table(path), others)
            return column, columns[label]
    return None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


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
        where = f"in {folder.path}/ " if folder.path else ""
        quoted = " ".join(map(quote, words))
        yield f"the file names {where}begin with labels ({_shown(labels)}): add {quoted}"


def _shown(labels: Counter[str]) -> str:
    some = ", ".join(f"{escape(label)} {number}" for label, number in labels.most_common(3))
    return f"{some} and {len(labels) - 3} more" if len(labels) > 3 else some


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
