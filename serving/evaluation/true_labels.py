"""True labels of the images of a table of scores: by the folder they lie in, or from a CSV file."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from serving.errors import DataError
from serving.evaluation.score_table import csv_rows

# As serving.inputs.tar names members: a.tar::cat/1.jpg, and a.tar::2::cat/1.jpg for the second one.
_ARCHIVE: Final = re.compile(r"\.(?:tar|tar\.\w+|t(?:gz|bz2|xz|zst))::(?:[0-9]+::)?", re.IGNORECASE)


class TrueLabels(Protocol):
    """Tells the true label of an image."""

    def meet(self, path: str) -> None:
        """Hear of every row's path, before the first label is asked for."""
        ...

    def of(self, path: str) -> str | None:
        """The true label; None where it is not known."""
        ...

    def notes(self) -> dict[str, int]:
        """How rows were matched where not by their path: what -> rows."""
        ...

    def why_none(self, example: str) -> str:
        """What to do where no row has a label; `example` is a row's path."""
        ...


class FolderLabels:
    """The label is the name of the folder that the image lies in, here or within its archive."""

    def meet(self, path: str) -> None:
        """Nothing to learn."""

    def of(self, path: str) -> str | None:
        """The last folder of the path."""
        folder = _inside(path).rpartition("/")[0].rstrip("/").rpartition("/")[2]
        return None if folder in ("", ".", "..") else folder

    def notes(self) -> dict[str, int]:
        """All are matched by their path."""
        return {"by_file_name": 0, "ambiguous_file_name": 0}

    def why_none(self, example: str) -> str:
        """The paths have no folders."""
        return f"--labels-from-folders: {example!r} lies in no folder; use --labels FILE"


class LabelFile:
    """Labels from a CSV file with a column of paths and one of labels.

    An image has the label of its own path; where that is not there, of the only path with its
    file's name, unless that path is another row's or several images could claim it.
    """

    def __init__(
        self, path: Path, column: str | None = None, path_column: str | None = None
    ) -> None:
        """Read the file; the columns are called "label" and "path" where not given.

        Raises:
            DataError: It is not there or torn, lacks a column, or gives a path two labels.
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
        self._met = bytearray(len(self._labels))
        self._by_name: dict[str, int | None] = {}
        self._claims: dict[int, str | None] = {}
        self._named = self._several = 0

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

    def meet(self, path: str) -> None:
        """Learn which paths have labels of their own, and which claim one by name."""
        place = self._places.get(_key(path))
        if place is not None:
            self._met[place] = True
            return
        place = self._names().get(_name(path))
        if place is not None and self._claims.setdefault(place, path) != path:
            self._claims[place] = None

    def of(self, path: str) -> str | None:
        """By the path, else by the file's name where that is beyond doubt."""
        place = self._places.get(_key(path))
        if place is not None:
            return self._labels[place] or None
        name = _name(path)
        if name not in self._names():
            return None
        place = self._names()[name]
        if place is None or self._met[place] or self._claims.get(place) != path:
            self._several += 1
            return None
        self._named += 1
        return self._labels[place] or None

    def notes(self) -> dict[str, int]:
        """Of rows without their own path."""
        return {"by_file_name": self._named, "ambiguous_file_name": self._several}

    def why_none(self, example: str) -> str:
        """The two tell other paths."""
        return (
            f"--labels {self._file} has {next(iter(self._places))!r}, the table {example!r}: no "
            "path is in both, nor a file name that is there once; write the paths as in the table"
        )

    def _names(self) -> dict[str, int | None]:
        """File name -> where its label stands; None where several paths end so."""
        if not self._by_name:
            for path, place in self._places.items():
                name = _name(path)
                self._by_name[name] = None if name in self._by_name else place
        return self._by_name


def _inside(path: str) -> str:
    """The path within the archive, where the image lies in one: `a.tar::cat/1.jpg`."""
    found = _ARCHIVE.search(path)
    return path[found.end() :] if found else path


def _name(path: str) -> str:
    return _key(_inside(path)).rpartition("/")[2]


def _key(path: str) -> str:
    """Bytes that are not UTF-8 as Parquet has them."""
    if path.isascii():
        return path
    with suppress(UnicodeEncodeError):  # of what stands for no bytes
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return path
