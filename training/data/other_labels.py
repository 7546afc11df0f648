"""Find tables beside the photos that give them other labels than their folders or names do."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import accumulate, islice
from pathlib import Path
from typing import Final, NamedTuple

from serving.errors import DataError, FledgeError
from serving.scoring.rows import COLUMNS
from serving.tables.columns import (
    LABELS,
    PARTS,
    find_paths,
    likely_labels,
    text_of,
    usual_columns,
)
from serving.tables.reader import open_table
from serving.terminal import quote
from serving.utils.label_names import normalize_label, similarity_key
from training.config.sections import DataConfig
from training.data.label_table import SUFFIXES, columns_option, read_label_table
from training.utils.console import quoted

MAX_TABLES: Final = 20
"""Largest number of tables of a folder that are compared with its photos."""
MAX_BYTES: Final = 2**26
"""Largest size of such a table."""

_GUESSED: Final = 200
"""Rows in which a column of labels without a usual name is looked for."""


class OtherLabels(NamedTuple):
    """A table that gives photos other labels: options, these labels, their number, the known."""

    config: DataConfig
    given: str
    labels: int
    known: str

    @property
    def options(self) -> str:
        """The options that read the table, as they are written in a shell."""
        columns = self.config.columns
        words = [] if columns == DataConfig().columns else [columns_option(*columns)]
        return " ".join([quote(f"data.csv={self.config.csv}"), *words])


def find_other_labels(
    root: Path, photos: Mapping[Path, str], base: str = "", *, guess: bool = False
) -> OtherLabels | None:
    """Find a table that gives the photos other labels than they have.

    Only tables that name most of the photos are looked at, and only those with a column of labels
    of a usual name; of a long table, the first rows.

    Args:
        root: Data folder.
        photos: Label of each photo, by its folder or its name.
        base: Folder below `root` in which the classes begin; tables are looked for in both and in
            those between.
        guess: Whether to look at columns of other names, too, that have a few words that repeat.
    """
    for name in tables_in(root, folders_down_to(base)):
        try:
            config = _with_columns(root, name, set(photos.values()))
            if config is None or (config.columns != DataConfig().columns and not guess):
                continue
            entries = read_label_table(
                root,
                config,
                lambda _: iter(photos),
                lambda _: "",
                checked=False,
                most=_MAX_ROWS,
            )
        except (OSError, FledgeError):
            continue
        labels = {entry.path: entry.label for entry in entries if entry.path in photos}
        words = Counter(labels.values())
        if len(labels) <= min(len(photos), _MAX_ROWS) / 2 or not (
            config.columns == DataConfig().columns or 1 < len(words) <= len(labels) / 3
        ):
            continue
        others = Counter(label for path, label in labels.items() if not _same(label, photos[path]))
        if others.total() > len(labels) / 4:
            given = _some([label for label, _ in others.most_common()])
            return OtherLabels(config, given, len(others), _some(sorted(set(photos.values()))))
    return None


def tables_in(root: Path, folders: Iterable[str]) -> Iterator[str]:
    """Yield the paths of the tables in folders, relative to `root`, of at most `MAX_BYTES`.

    Args:
        root: Data folder.
        folders: Paths relative to it, "" for itself. Of each, `MAX_TABLES` are looked at.
    """
    for folder in folders:
        try:
            names = sorted(os.listdir(root / folder))
        except OSError:
            continue
        tables = [name for name in names if name.lower().endswith(SUFFIXES)]
        for name in tables[:MAX_TABLES]:
            path = os.path.join(folder, name)
            if os.path.isfile(root / path) and os.path.getsize(root / path) <= MAX_BYTES:
                yield path


def folders_down_to(base: str) -> list[str]:
    """Return the paths of the folders from the data folder, which is "", down to `base`."""
    return list(accumulate(filter(None, base.split("/")), os.path.join, initial=""))


def _with_columns(root: Path, name: str, known: Set[str]) -> DataConfig | None:
    """Return the options that read a table; None if no column of it may be other labels.

    Without a column of labels of a usual name, it is the one of the fewest words, unless another
    has the labels that are known.
    """
    config = DataConfig(csv=name)
    table = open_table(root / name)
    if set(COLUMNS) <= set(table.columns):  # a table that `fledge score` has written
        return None
    if usual_columns(table.columns, LABELS):
        return config
    at = find_paths(table, None, name, str, preferred="id", always=False)
    parts = usual_columns(table.columns, PARTS)
    others = [i for i in range(len(table.columns)) if i != at and i not in parts]
    rows = [row.values for row in islice(table.rows(others), _GUESSED)]
    words = {
        i: {normalize_label(text_of(row[j])) for row in rows if j < len(row)}
        for j, i in enumerate(others)
    }
    keys = {similarity_key(label) for label in known}
    if any(keys.issuperset(map(similarity_key, found)) for found in words.values()):
        return None
    others = [i for i in others if all(map(_is_word, words[i]))]
    if not others:
        return None
    columns = table.columns[at], table.columns[likely_labels(table, others)]
    return config.model_copy(update={"columns": columns})


def _is_word(text: str) -> bool:
    """Check whether a value may be a label: three letters at least, and no answer yes or no."""
    return sum(map(str.isalpha, text)) > 2 and text.casefold() not in ("true", "false", "yes")


def check_tables(root: Path, photos: Mapping[Path, str], base: str = "") -> None:
    """Check that no table gives photos other labels than their folders do.

    Args:
        root: Data folder.
        photos: Label of each photo, by its folder.
        base: Folder below `root` in which the classes begin.

    Raises:
        DataError: A table does; the message names the options that settle it.
    """
    if other := find_other_labels(root, photos, base, guess=True):
        raise DataError(
            f"{root}: {other.config.csv} gives the photos other labels ({other.given}) than their "
            f"folders do ({other.known}): add {other.options}; or, if the folders are the classes, "
            "add data.layout=classes"
        )


def _same(one: str, other: str) -> bool:
    return one == other or similarity_key(one) == similarity_key(other)


def _some(labels: Sequence[str]) -> str:
    shown = ", ".join(map(quoted, labels[:3]))
    return f"{shown} and {len(labels) - 3} more" if len(labels) > 3 else shown


_MAX_ROWS: Final = 2000
"""Rows of a table by which its labels are compared with those of the folders."""
