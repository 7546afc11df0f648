"""Lists of inputs -> their paths, one after the other, without holding them.

A path is relative to the current folder. `.txt` and standard input have a path a line; blank lines
are passed over. `.csv`, `.tsv`, `.jsonl` and `.parquet` have a column of them.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, Final

from serving.errors import DataError
from serving.inputs.folders import Note, is_image
from serving.utils.optional_packages import require

LINES: Final = ".txt"
DEFAULT: Final = "path"
"""The column where none is named and there are several."""

_PIECE: Final = 2**16
_LONGEST: Final = 4096
"""Bytes that a path may have: a NUL that separates paths comes before so many."""
_FIELD: Final = 2**27
"""Characters of one CSV field: a table may hold more than paths."""

_BLANK: Final = object()
"""A row with nothing in it."""

_BROKEN: Final = (OSError, ValueError, csv.Error)  # pyarrow's are one of these


def lines(path: str, note: Note) -> Iterator[str]:
    """The lines of a text file."""
    try:
        with open(path, "rb") as file:
            yield from _paths(_split(_pieces(file), b"\n"), "\r")
    except OSError as error:
        note(f"{path}: can't be read: {error.strerror or error}")


def piped(stream: IO[bytes] | IO[str]) -> Iterator[str]:
    """The lines of a pipe, or what ends in NUL, as `find -print0` has it.

    Which of both is told by a NUL among so many bytes as the first path may have.
    """
    pieces, start = _pieces(stream), b""
    for piece in pieces:
        start += piece
        if b"\0" in start or len(start) > _LONGEST:
            break
    pieces = chain([start], pieces)
    if b"\0" in start[: _LONGEST + 1]:
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
        *whole, rest = (rest + piece).split(separator)
        yield from whole
        rest = rest[:_PIECE]  # a file without lines is no list, and must not fill the memory
    yield rest


def _paths(found: Iterable[bytes], ending: str) -> Iterator[str]:
    for number, line in enumerate(found):
        path = line.decode("utf-8", "surrogateescape").removesuffix(ending)
        path = path if number else path.removeprefix("\ufeff")
        if path.strip():
            yield path


@dataclass(frozen=True)
class _Kind:
    """A file format. columns: their names; values: of one of them in every row, or `_BLANK`."""

    columns: Callable[[str], list[str]]
    values: Callable[[str, str], Iterator[object]]


def column_of(path: str, wanted: str | None) -> str:
    """The column that has the paths: the one wanted, else `path`, else the only one.

    Raises:
        DataError: There is none; names those there are.
    """
    try:
        names = _kind(path).columns(path)
    except _BROKEN as error:
        raise DataError(f"{path}: can't be read: {_reason(error)}") from error
    if not names:
        raise DataError(f"{path}: lists no images; it is empty")
    column = wanted or (names[0] if len(names) == 1 else DEFAULT)
    have = ", ".join(names[:20])
    if not wanted and len(names) == 1 and is_image(column):
        raise DataError(f"{path}: starts with {column}; name the columns in the first line")
    if names.count(column) > 1:
        raise DataError(f"{path}: two columns are called {column}")
    if column not in names:
        choose = "" if wanted else "; say which has the paths: --column NAME"
        raise DataError(f"{path}: no column {column} among {have}{choose}")
    return column


def cells(path: str, column: str, note: Note) -> Iterator[str]:
    """The paths of a column. Rows without one are counted and told."""
    row = wrong = first = 0
    try:
        for row, value in enumerate(_kind(path).values(path, column), 1):
            found = os.fsdecode(value) if isinstance(value, bytes) else value
            if isinstance(found, str) and found.strip():
                yield found
            elif found is not _BLANK:
                wrong, first = wrong + 1, first or row
    except _BROKEN as error:
        note(f"{path}: broken after row {row}; what follows is left out ({_reason(error)})")
    if wrong:
        note(f"{path}: rows without a path in {column} are left out: {wrong}, the first is {first}")


def is_table(path: str) -> bool:
    """Whether a name ends as those of lists with columns do."""
    return os.path.splitext(path)[1].lower() in TABLES


def _kind(path: str) -> _Kind:
    return TABLES[os.path.splitext(path)[1].lower()]


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())


def _records(path: str) -> Iterator[list[str]]:
    csv.field_size_limit(_FIELD)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        start = file.readline()
        # Spreadsheets write semicolons where the comma is in numbers.
        comma = ";" if ";" in start and "," not in start else ","
        tabs = path.lower().endswith(".tsv")
        rows = chain([start], file) if start else file
        yield from csv.reader(rows, delimiter="\t" if tabs else comma, strict=True)


def _csv_columns(path: str) -> list[str]:
    return next(filter(any, _records(path)), [])


def _csv_values(path: str, column: str) -> Iterator[object]:
    records = _records(path)
    place = next(filter(any, records)).index(column)
    for record in records:
        if not "".join(record).strip():
            yield _BLANK
        else:
            yield record[place] if place < len(record) else None


def _objects(path: str) -> Iterator[object]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
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
        yield value.get(column) if isinstance(value, dict) else value if value is _BLANK else None


def _parquet_file(path: str) -> Any:
    require("pyarrow", "Parquet", "pip install 'fledge[parquet]'; or use .csv")
    return importlib.import_module("pyarrow.parquet").ParquetFile(path)


def _parquet_columns(path: str) -> list[str]:
    with _parquet_file(path) as file:
        return list(file.schema_arrow.names)


def _parquet_values(path: str, column: str) -> Iterator[object]:
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=1000, columns=[column]):
            yield from batch.column(0).to_pylist()


TABLES: Final[dict[str, _Kind]] = {
    ".csv": _Kind(_csv_columns, _csv_values),
    ".tsv": _Kind(_csv_columns, _csv_values),
    ".jsonl": _Kind(_json_columns, _json_values),
    ".parquet": _Kind(_parquet_columns, _parquet_values),
}
