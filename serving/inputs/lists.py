"""Read lists of image paths as a stream: text files, standard input, and tables with columns.

A `.txt` file and standard input have one path in each line; blank lines are skipped. `.csv`,
`.tsv`, `.jsonl` and `.parquet` files have a column of paths. Relative paths start from the current
working directory.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

from serving.errors import DataError
from serving.inputs.folders import Note, is_image
from serving.utils.files import utf8_path
from serving.utils.optional_packages import require_parquet
from serving.utils.regular_files import limited_lines

LINES: Final = ".txt"
DEFAULT: Final = "path"
"""Column of the paths in a list with several columns, unless the user names another."""

_PIECE: Final = 2**16
_LONGEST_PATH: Final = 4096
"""Bytes of the longest path. If NUL separates the paths, the first NUL is before this position."""
_LONGEST_FIELD: Final = 2**27
"""Largest number of characters of a CSV field; columns other than the paths may be long."""

_BLANK: Final = object()
"""Value that stands for an empty table row."""

_CORRUPT: Final = (OSError, ValueError, csv.Error)  # pyarrow's errors are subclasses of these


def read_lines(path: str, note: Note) -> Iterator[str]:
    """Yield the paths in a text file, one from each line.

    Args:
        path: The text file.
        note: Called with a message if the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            yield from _paths(_split(_pieces(file), b"\n"), "\r")
    except OSError as error:
        note(f"{path}: can't be read: {error.strerror or error}")


def read_stream(stream: IO[bytes] | IO[str]) -> Iterator[str]:
    """Yield the paths in a stream. The separator is a line break or a NUL byte.

    The separator is NUL if a NUL byte occurs in the first 4096 bytes, as in the output of
    `find -print0`.
    """
    pieces, start = _pieces(stream), b""
    for piece in pieces:
        start += piece
        if b"\0" in start or len(start) > _LONGEST_PATH:
            break
    pieces = chain([start], pieces)
    if b"\0" in start[: _LONGEST_PATH + 1]:
        return _paths(_split(pieces, b"\0"), "")
    return _paths(_split(pieces, b"\n"), "\r")


def _pieces(stream: IO[bytes] | IO[str]) -> Iterator[bytes]:
    binary: Any = getattr(stream, "buffer", stream)
    read = getattr(binary, "read1", binary.read)
    while piece := read(_PIECE):
        yield piece.encode("utf-8", "surrogateescape") if isinstance(piece, str) else piece


def _split(pieces: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *complete, rest = (rest + piece).split(separator)
        yield from complete
        rest = rest[:_PIECE]  # bounds the memory if a file has no line breaks and is no list
    yield rest


def _paths(lines: Iterable[bytes], ending: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        path = line.decode("utf-8", "surrogateescape").removesuffix(ending)
        path = path if number else path.removeprefix("\ufeff")
        if path.strip():
            yield path


@dataclass(frozen=True)
class _Format:
    """Functions that read one file format of lists with columns.

    Attributes:
        columns: Function that takes the path of a list and returns the names of the columns.
        values: Function that takes the path of a list and a column name, and yields the value of
            that column in every table row. The value is `_BLANK` for an empty row.
    """

    columns: Callable[[str], list[str]]
    values: Callable[[str, str], Iterator[object]]


def path_column(path: str, requested: str | None) -> str:
    """Return the name of the column that has the image paths.

    Args:
        path: A list with columns.
        requested: The column name that the user gave. None: the only column if there is just one,
            else the column "path".

    Raises:
        DataError: The list can't be read or is empty, lacks the column, has two columns of that
            name, or starts with an image path instead of column names.
    """
    try:
        names = _format(path).columns(path)
    except _CORRUPT as error:
        raise DataError(f"{path}: can't be read: {_reason(error)}") from error
    if not names:
        raise DataError(f"{path}: lists no images; it is empty")
    column = requested or (names[0] if len(names) == 1 else DEFAULT)
    if not requested and len(names) == 1 and is_image(column):
        raise DataError(f"{path}: starts with {column}; name the columns in the first line")
    if names.count(column) > 1:
        raise DataError(f"{path}: two columns are called {column}")
    if column not in names:
        shown = ", ".join(names[:20])
        remedy = "" if requested else "; name the column of the paths: --column NAME"
        raise DataError(f"{path}: no column {column} among {shown}{remedy}")
    return column


def read_column(path: str, column: str, note: Note) -> Iterator[str]:
    """Yield the image paths in one column of a list.

    Args:
        path: A list with columns.
        column: Name of the column.
        note: Called at the end with the number of table rows without a path, and with an error
            message if the list is corrupt.
    """
    row = missing = first = 0
    try:
        for row, value in enumerate(_format(path).values(path, column), 1):
            found = os.fsdecode(value) if isinstance(value, bytes) else value
            if isinstance(found, str) and found.strip():
                yield found
            elif found is not _BLANK:
                missing, first = missing + 1, first or row
    except _CORRUPT as error:
        note(f"{path}: broken after row {row}; what follows is left out ({_reason(error)})")
    if missing:
        note(
            f"{path}: rows without a path in {column} are left out: {missing}, the first is {first}"
        )


def is_table(path: str) -> bool:
    """Check whether a file name has the suffix of a list with columns, such as `.csv`."""
    return os.path.splitext(path)[1].lower() in TABLES


def _format(path: str) -> _Format:
    return TABLES[os.path.splitext(path)[1].lower()]


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())


def _records(path: str) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        start = file.readline()
        # Spreadsheets separate by semicolons in locales with a decimal comma.
        comma = ";" if ";" in start and "," not in start else ","
        tabs = path.lower().endswith(".tsv")
        rows = chain([start], file) if start else file
        yield from csv.reader(rows, delimiter="\t" if tabs else comma, strict=True)


def _csv_columns(path: str) -> list[str]:
    return next(filter(any, _records(path)), [])


def _csv_values(path: str, column: str) -> Iterator[object]:
    records = _records(path)
    index = next(filter(any, records)).index(column)
    for record in records:
        if not "".join(record).strip():
            yield _BLANK
        else:
            yield record[index] if index < len(record) else None


def _objects(path: str) -> Iterator[object]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in limited_lines(file):
            try:
                yield json.loads(line) if line.strip() else _BLANK
            except (ValueError, RecursionError):
                yield None


def _json_columns(path: str) -> list[str]:
    first = next((value for value in _objects(path) if value is not _BLANK), {})
    if not isinstance(first, dict):
        raise DataError(f"{path}: its first line is no JSON object")
    return list(first)


def _json_values(path: str, column: str) -> Iterator[object]:
    for value in _objects(path):
        if value is _BLANK:
            yield value
        else:
            found = value.get(column) if isinstance(value, dict) else None
            yield found if isinstance(found, str) and _is_path(found) else None


def _is_path(text: str) -> bool:
    """Check whether a text can be the name of a file: JSON may have lone surrogates."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _parquet_file(path: str) -> Any:
    require_parquet()
    with utf8_path(Path(path)) as name:
        return importlib.import_module("pyarrow.parquet").ParquetFile(name)


def _parquet_columns(path: str) -> list[str]:
    with _parquet_file(path) as file:
        return list(file.schema_arrow.names)


def _parquet_values(path: str, column: str) -> Iterator[object]:
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=1000, columns=[column]):
            yield from batch.column(0).to_pylist()


TABLES: Final[dict[str, _Format]] = {
    ".csv": _Format(_csv_columns, _csv_values),
    ".tsv": _Format(_csv_columns, _csv_values),
    ".jsonl": _Format(_json_columns, _json_values),
    ".parquet": _Format(_parquet_columns, _parquet_values),
}
"""Maps a suffix to the format of a list with columns."""
