"""Find the true label of each image in a table of scores: by its folder, or in a CSV file."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from serving.errors import DataError
from serving.evaluation.table_reader import csv_rows

# The archive in the name of a member (`serving.inputs.tar`): a.tar::cat/1.jpg, a.tar::2::cat/1.jpg.
_ARCHIVE: Final = re.compile(r"\.(?:tar|tar\.\w+|t(?:gz|bz2|xz|zst))::(?:[0-9]+::)?", re.IGNORECASE)


class TrueLabels(Protocol):
    """Source of the true labels of images.

    Call `register` for every path of the table first, and then `label_of`.
    """

    def register(self, path: str) -> None:
        """Add the path of an image in the table; needed before the first `label_of`."""
        ...

    def label_of(self, path: str) -> str | None:
        """Return the true label of the image at `path`; None if it is unknown."""
        ...

    def match_counts(self) -> dict[str, int]:
        """Return two numbers of images, under the keys of the JSON output.

        - by_file_name: images whose true label was found by the file name alone.
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
    """True labels from folder names: the label is the name of the folder that contains the image.

    For an image in a tar archive, the folder is the one inside the archive.
    """

    def register(self, path: str) -> None:
        pass

    def label_of(self, path: str) -> str | None:
        folder = _inside(path).rpartition("/")[0].rstrip("/").rpartition("/")[2]
        return None if folder in ("", ".", "..") else folder

    def match_counts(self) -> dict[str, int]:
        return {"by_file_name": 0, "ambiguous_file_name": 0}

    def no_match_message(self, example: str) -> str:
        return f"--labels-from-folders: {example!r} lies in no folder; use --labels FILE"


class LabelFile:
    """True labels from a CSV file with a column of paths and a column of labels.

    An image is matched by its path or, if the CSV file does not list that path, by its file name. A
    match by file name is only made if all of these hold:

        - The CSV file lists only one path with this file name.
        - The table has no image at that path.
        - The table has no other image that would be matched by this file name.
    """

    def __init__(
        self, path: Path, column: str | None = None, path_column: str | None = None
    ) -> None:
        """Read the CSV file.

        Args:
            path: The CSV file.
            column: Name of the column of labels; None: "label".
            path_column: Name of the column of paths; None: "path".

        Raises:
            DataError: The file can't be read or has no rows, lacks a column, or gives two different
                labels for one path.
        """
        self._file = path
        column, path_column = column or "label", path_column or "path"
        self._places: dict[str, int] = {}
        self._labels: list[str] = []
        self._lines: list[str] = []
        try:
            for where, values in csv_rows(path):
                for option, name in (("--labels-column", column), ("--path-column", path_column)):
                    if name not in values:
                        have = ", ".join(map(repr, values))
                        raise DataError(
                            f"--labels {path}: no column {name!r} among {have}; name it with "
                            f"{option}"
                        )
                self._add(values[path_column], values[column].strip(), where)
        except OSError as error:
            raise DataError(
                f"--labels {path}: can't be read: {error.strerror or error}; give a CSV file "
                f"with the columns {path_column} and {column}"
            ) from error
        if not self._places:
            raise DataError(f"--labels {path}: no labels in it; write lines of path,label")
        self._in_table = bytearray(len(self._labels))
        self._by_name: dict[str, int | None] = {}
        self._name_users: dict[int, str | None] = {}
        self._named = self._ambiguous = 0

    def _add(self, path: str, label: str, where: str) -> None:
        key = _key(path)
        place = self._places.setdefault(key, len(self._labels))
        if place < len(self._labels):
            if self._labels[place] != label:
                raise DataError(
                    f"--labels {self._file}: {path!r} is {self._labels[place]!r} in "
                    f"{self._lines[place]} and {label!r} in {where}; keep one"
                )
            return
        self._labels.append(label)
        self._lines.append(where)

    def register(self, path: str) -> None:
        place = self._places.get(_key(path))
        if place is not None:
            self._in_table[place] = True
            return
        place = self._names().get(_name(path))
        if place is not None and self._name_users.setdefault(place, path) != path:
            self._name_users[place] = None

    def label_of(self, path: str) -> str | None:
        place = self._places.get(_key(path))
        if place is not None:
            return self._labels[place] or None
        name = _name(path)
        if name not in self._names():
            return None
        place = self._names()[name]
        if place is None or self._in_table[place] or self._name_users.get(place) != path:
            self._ambiguous += 1
            return None
        self._named += 1
        return self._labels[place] or None

    def match_counts(self) -> dict[str, int]:
        return {"by_file_name": self._named, "ambiguous_file_name": self._ambiguous}

    def no_match_message(self, example: str) -> str:
        return (
            f"--labels {self._file} has {next(iter(self._places))!r}, the table {example!r}: no "
            "path is in both, and no file name is in both once; write the paths as in the table"
        )

    def _names(self) -> dict[str, int | None]:
        """Return a mapping from file name to the index of the label in `_labels`.

        The index is None if several paths have the same file name.
        """
        if not self._by_name:
            for path, place in self._places.items():
                name = _name(path)
                self._by_name[name] = None if name in self._by_name else place
        return self._by_name


def _inside(path: str) -> str:
    """Return the path within a tar archive: `cat/1.jpg` for `a.tar::cat/1.jpg`.

    A path outside archives is returned unchanged.
    """
    found = _ARCHIVE.search(path)
    return path[found.end() :] if found else path


def _name(path: str) -> str:
    return _key(_inside(path)).rpartition("/")[2]


def _key(path: str) -> str:
    """Return the path in the form of a Parquet table of scores: invalid UTF-8 bytes are escaped."""
    if path.isascii():
        return path
    with suppress(UnicodeEncodeError):  # for surrogates that do not come from surrogateescape
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return path
