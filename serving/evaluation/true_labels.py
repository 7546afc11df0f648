"""Find the true label of each image in a table of scores: by folder, or in a table of labels."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from serving.errors import DataError
from serving.tables.columns import find_labels, find_paths, has_image_suffix, text_of
from serving.tables.reader import Table, limited_rows, open_table, too_few
from serving.terminal import quote
from serving.utils.label_names import LabelMatcher, is_utf8, normalize_label, show_label
from serving.utils.mistakes import Mistakes

_LONGEST_END: Final = 3
"""Number of names at the end of a path by which it is matched."""
_MOST_NAMES: Final = 100_000
"""Largest number of distinct folder names that are counted."""

# The archive in the name of a member (`serving.inputs.tar`): a.tar::cat/1.jpg, a.tar::2::cat/1.jpg.
_ARCHIVE: Final = re.compile(r"\.(?:zip|tar|tar\.\w+|t(?:gz|bz2|xz|zst))::(?:[0-9]+::)?", re.I)


class TrueLabels(Protocol):
    """Source of the true labels of images.

    Call `register` for every path of the table first, then `set_classes`, and then `label_of`.
    """

    def register(self, path: str) -> None:
        """Add the path of an image in the table; needed before the first `label_of`."""
        ...

    def set_classes(self, classes: Collection[str]) -> None:
        """Set the classes of the model, or the predicted labels if the classes are unknown."""
        ...

    def label_of(self, path: str) -> str | None:
        """Return the true label of the image at `path`; None if it is unknown."""
        ...

    def match_counts(self) -> dict[str, int]:
        """Return three numbers of images, under the keys of the JSON output.

        - by_file_name: images whose true label was found by the file name alone.
        - by_path_end: images whose true label was found by the end of the path, folders included.
        - ambiguous_file_name: images without a true label, because the file name matches
          several paths.
        """
        ...

    def no_match_message(self, example: str) -> str:
        """Return the error message for a table in which no image has a true label.

        Args:
            example: Path of one image of the table.
        """
        ...


class FolderLabels:
    """True labels from folder names, by the rule that training has.

    Training takes the first folder below the data folder, or below the folder of a part. A table of
    scores does not say where the data folder is; the classes of the model show it:

        1. The label is the first folder, below those that all images share, that is a class.
        2. If none is, it is the last of the shared folders that is a class: all images are of it.
        3. If none is, it is the folder at the level where most images have their class; or the
           folder that contains the image, if no image has one.

    For an image in an archive, the folders are those inside the archive.
    """

    def __init__(self) -> None:
        self._shared: list[str] | None = None
        self._names: Counter[tuple[int, str]] = Counter()
        self._matcher = LabelMatcher(())
        self._level = -1

    def register(self, path: str) -> None:
        folders = _folders(path)
        if self._shared is None:
            self._shared = folders
        else:
            pairs = zip(self._shared, folders, strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            self._shared = self._shared[: len(folders) if same is None else same]
        for name in enumerate(folders):
            if name in self._names or len(self._names) < _MOST_NAMES:
                self._names[name] += 1

    def set_classes(self, classes: Collection[str]) -> None:
        self._matcher = LabelMatcher(classes)
        counts: Counter[int] = Counter()
        for (level, name), count in self._names.items():
            if level >= len(self._shared or ()) and self._matcher.match(name) is not None:
                counts[level] += count
        self._level = max(counts, key=lambda level: (counts[level], -level), default=-1)

    def label_of(self, path: str) -> str | None:
        match, folders = self._matcher.match, _folders(path)
        shared = len(self._shared or ())
        for name in (*folders[shared:], *reversed(folders[:shared])):
            if match(name) is not None:
                return name
        if not folders:
            return None
        return folders[self._level if self._level < len(folders) else -1]

    def match_counts(self) -> dict[str, int]:
        return {"by_file_name": 0, "by_path_end": 0, "ambiguous_file_name": 0}

    def no_match_message(self, example: str) -> str:
        return f"--labels-from-folders: {example!r} lies in no folder; use --labels FILE"


class LabelFile:
    """True labels from a table with a column of paths and a column of labels.

    An image is matched by its path or, if the table of labels does not list that path, by the end
    of its path: the last three, two or one of its names. The last name may lack the suffix in the
    table of labels. A match by the end is only made if all of these hold:

        - The table of labels lists only one path with this end.
        - The table of scores has no image at that path.
        - The table of scores has no other image that would be matched by it.
    """

    def __init__(
        self, path: Path, column: str | None = None, path_column: str | None = None
    ) -> None:
        """Read the table of labels.

        Args:
            path: The table; see `serving.tables.reader`.
            column: Name of the column of labels; None: see `table_columns.find_labels`.
            path_column: Name of the column of paths; None: see `table_columns.find_paths`.

        Raises:
            DataError: The file can't be read or has no rows, its columns can't be told, or rows are
                wrong: two different labels for one path, or more fields than columns.
        """
        self._file = path
        self._places: dict[str, int] = {}
        self._labels: list[str] = []
        self._unlabelled = ""
        self._lines: list[int] = []
        where = f"--labels {path}"
        try:
            table = open_table(path, [name for name in (column, path_column) if name])
        except OSError as error:
            raise DataError(
                f"{where}: can't be read: {error.strerror or error}; give a table with the columns "
                f"{path_column or 'path'} and {column or 'label'}"
            ) from error
        if next(table.rows([0]), None) is None:
            raise DataError(f"{where}: no labels in it; write lines of path,label")
        paths = find_paths(table, path_column, where, lambda name: f"--path-column {quote(name)}")
        labels = find_labels(
            table, column, paths, where, lambda name: f"--labels-column {quote(name)}"
        )
        self._column = table.columns[labels]
        wrong = Mistakes(where)
        for row in limited_rows(table, [paths, labels]):
            place = table.where(row.number)
            name, label = (text_of(value) for value in row.values)
            if row.wrong or row.fields < len(table.columns):
                wrong.add(f"{place}: {row.wrong or too_few(row, table)}")
            elif not is_utf8(label):
                wrong.add(
                    f"{place}: label {show_label(label)} is not UTF-8; save the table as 'CSV "
                    "UTF-8'",
                    "labels that are not UTF-8",
                )
            else:
                wrong.add(self._add(name, normalize_label(label), row.number, table))
        wrong.check()
        if not self._places:
            raise DataError(f"{where}: no labels in it; write lines of path,label")
        self._in_table = bytearray(len(self._labels))
        self._by_end: dict[str, int | None] = {}
        self._end_users: dict[int, str | None] = {}
        self._named = self._by_path_end = self._ambiguous = 0

    def _add(self, path: str, label: str, number: int, table: Table) -> str:
        """Add a row; returns what is wrong with it, or ""."""
        place = self._places.setdefault(_key(path), len(self._labels))
        if place == len(self._labels):
            self._labels.append(label)
            self._lines.append(number)
        elif self._labels[place] != label:
            return (
                f"{table.where(number)}: {path!r} is {show_label(self._labels[place])} in "
                f"{table.where(self._lines[place])} and {show_label(label)} in "
                f"{table.where(number)}; keep one"
            )
        return ""

    def set_classes(self, classes: Collection[str]) -> None:
        pass

    def register(self, path: str) -> None:
        place = self._places.get(_key(path))
        if place is not None:
            self._in_table[place] = True
            return
        place, _ = self._match_end(path)
        if place is not None and self._end_users.setdefault(place, path) != path:
            self._end_users[place] = None

    def label_of(self, path: str) -> str | None:
        place = self._places.get(_key(path))
        if place is not None:
            return self._label(place, path)
        if not any(end in self._ends() for end in _ends(path)):
            return None
        place, end = self._match_end(path)
        if place is None or self._in_table[place] or self._end_users.get(place) != path:
            self._ambiguous += 1
            return None
        if "/" in end:
            self._by_path_end += 1
        else:
            self._named += 1
        return self._label(place, path)

    def _label(self, place: int, path: str) -> str | None:
        self._unlabelled = self._unlabelled or ("" if self._labels[place] else path)
        return self._labels[place] or None

    def match_counts(self) -> dict[str, int]:
        return {
            "by_file_name": self._named,
            "by_path_end": self._by_path_end,
            "ambiguous_file_name": self._ambiguous,
        }

    def no_match_message(self, example: str) -> str:
        if self._unlabelled:
            return (
                f"--labels {self._file}: the row of {self._unlabelled!r} has no label in the "
                f"column {self._column!r}; write one"
            )
        return (
            f"--labels {self._file} has {next(iter(self._places))!r}, the table {example!r}: no "
            "path is in both, and no file name is in both once; write the paths as in the table"
        )

    def _match_end(self, path: str) -> tuple[int | None, str]:
        """Return the index of the label whose path has the longest common end, and that end.

        The index is None if several have it, or none.
        """
        ends = self._ends()
        return next(((ends[end], end) for end in _ends(path) if end in ends), (None, ""))

    def _ends(self) -> dict[str, int | None]:
        """Return a mapping from ends of paths to the index of the label in `_labels`.

        The index is None if several paths have the same end.
        """
        if not self._by_end:
            for path, place in self._places.items():
                for end in _ends(path, suffixless=False):
                    self._by_end[end] = None if end in self._by_end else place
        return self._by_end


def _folders(path: str) -> list[str]:
    """Return the names of the folders of an image, within its archive if it lies in one."""
    inside = _inside(path)
    names = (inside if "/" in inside else inside.replace("\\", "/")).split("/")[:-1]
    return [name for name in names if name not in ("", ".", "..")]


def _inside(path: str) -> str:
    """Return the path within a tar archive: `cat/1.jpg` for `a.tar::cat/1.jpg`.

    A path outside archives is returned unchanged.
    """
    found = _ARCHIVE.search(path)
    return path[found.end() :] if found else path


def _ends(path: str, *, suffixless: bool = True) -> Iterator[str]:
    """Yield the last three, two and one names of a path, each with and without the suffix."""
    names = _key(_inside(path)).split("/")
    for count in range(min(_LONGEST_END, len(names)), 0, -1):
        end = "/".join(names[-count:])
        yield end
        if suffixless and has_image_suffix(end):
            yield end.rpartition(".")[0]


def _key(path: str) -> str:
    """Return a path in one form, whichever system and format it comes from.

    Separators are slashes, `./` and double slashes are removed, the Unicode form is NFC, and
    invalid UTF-8 bytes are escaped as in a Parquet table of scores.
    """
    if not path.isascii():
        with suppress(UnicodeEncodeError):  # for surrogates that do not come from surrogateescape
            path = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        path = unicodedata.normalize("NFC", path)
    path = path.replace("\\", "/")
    if "//" in path or path.startswith("./") or "/./" in path:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        path = "/" * path.startswith("/") + "/".join(parts)
    return path
