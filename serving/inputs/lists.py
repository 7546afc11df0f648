"""Read lists of image paths as a stream: text files, standard input, and tables with columns.

A `.txt` file and standard input have one path in each line; blank lines are skipped. `.csv`,
`.tsv`, `.jsonl` and `.parquet` files have a column of paths (`serving.tables.reader`). Relative
paths start from the current working directory; where none of the first paths is there, from the
folder of the list. A path with backslashes that is no file is tried with slashes, too.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import IO, Any, Final

from serving.errors import DataError
from serving.inputs.folders import Note
from serving.tables.columns import find_paths
from serving.tables.dialect import check_kind, find_encoding
from serving.tables.reader import TABLES, EmptyTable, Table, open_table
from serving.terminal import quote

LINES: Final = ".txt"

_PIECE: Final = 2**16
_LONGEST_PATH: Final = 4096
"""Bytes of the longest path. If NUL separates the paths, the first NUL is before this position."""
_SAMPLE: Final = 20
"""Number of paths that decide where relative paths start."""


def read_lines(path: str, note: Note) -> Iterator[str]:
    """Yield the paths in a text file, one from each line.

    Args:
        path: The text file.
        note: Called with a message if the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            pieces = _pieces(file)
            head = next(pieces, b"")
            check_kind(path, head)
            pieces = _in_utf8(chain([head], pieces), find_encoding(head) or "utf-8")
            yield from _placed(_paths(_split(pieces, b"\n"), "\r"), os.path.dirname(path))
    except DataError as error:
        note(str(error))
    except OSError as error:
        note(f"{path}: can't be read: {error.strerror or error}")
    except UnicodeError as error:
        note(f"{path}: can't be read: {error}")


def read_stream(stream: IO[bytes] | IO[str]) -> Iterator[str]:
    """Yield the paths in a stream. The separator is a line break or a NUL byte.

    The separator is NUL if a NUL byte occurs in the first 4096 bytes, as in the output of
    `find -print0`. A stream that begins with a byte-order mark of UTF-16 has lines.
    """
    pieces, start = _pieces(stream), b""
    for piece in pieces:
        start += piece
        if b"\0" in start or len(start) > _LONGEST_PATH:
            break
    pieces = chain([start], pieces)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        pieces = _in_utf8(pieces, find_encoding(start))
    elif b"\0" in start[: _LONGEST_PATH + 1]:
        return _paths(_split(pieces, b"\0"), "")
    return _paths(_split(pieces, b"\n"), "\r")


def _pieces(stream: IO[bytes] | IO[str]) -> Iterator[bytes]:
    binary: Any = getattr(stream, "buffer", stream)
    read = getattr(binary, "read1", binary.read)
    while piece := read(_PIECE):
        yield piece.encode("utf-8", "surrogateescape") if isinstance(piece, str) else piece


def _in_utf8(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield the pieces of a text in UTF-16 or UTF-32 as UTF-8; others unchanged."""
    if encoding.startswith("utf-8"):
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    for piece in chain(pieces, [b""]):
        yield decoder.decode(piece, final=not piece).encode("utf-8", "surrogateescape")


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


def _placed(paths: Iterator[str], folder: str) -> Iterator[str]:
    """Yield paths as names of files from the current working directory.

    Args:
        paths: The paths in a list.
        folder: Folder of the list; "" if it is the current one.
    """
    first = list(islice(paths, _SAMPLE))
    place = _slashed
    if folder and not any(map(_exists, map(_slashed, first))):
        below = partial(_below, folder)
        place = below if any(map(_exists, map(below, first))) else place
    return map(place, chain(first, paths))


def _slashed(path: str) -> str:
    """Return a path of Windows with slashes, if that is a file and the path itself is none."""
    if "\\" not in path or _exists(path):
        return path
    slashed = path.replace("\\", "/")
    return slashed if _exists(slashed) else path


def _below(folder: str, path: str) -> str:
    return path if "://" in path else _slashed(os.path.join(folder, path))


def _exists(path: str) -> bool:
    return os.path.exists(path.partition("::")[0])


def open_list(path: str, requested: str | None) -> tuple[Table, int]:
    """Return a list with columns, and the index of the column that has the image paths.

    Args:
        path: A list with columns.
        requested: The column name that the user gave. None: see `table_columns.find_paths`.

    Raises:
        DataError: The list can't be read or is empty, or its column of paths can't be told.
    """
    try:
        table = open_table(path, () if requested is None else (requested,))
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    except EmptyTable as error:
        raise DataError(f"{path}: lists no images; it is empty") from error
    folder = os.path.dirname(path)
    if requested is None:
        table = table.with_first_row(
            lambda name: _exists(_slashed(name)) or _exists(_below(folder, name))
        )
    return table, find_paths(table, requested, path, lambda name: f"--column {quote(name)}")


def read_column(table: Table, column: int, note: Note) -> Iterator[str]:
    """Yield the image paths in one column of a list.

    Args:
        table: A list with columns.
        column: Index of the column.
        note: Called at the end with the numbers of rows that are left out, and with an error
            message if the list is corrupt.
    """
    return _placed(_values(table, column, note), os.path.dirname(table.path))


def _values(table: Table, column: int, note: Note) -> Iterator[str]:
    missing: list[int] = []  # count and first row, of rows without a path
    wrong: list[int] = []
    try:
        for row in table.rows([column]):
            (value,) = row.values
            if row.wrong and row.fields > len(table.columns):
                wrong = [wrong[0] + 1, wrong[1]] if wrong else [1, row.number]
            elif isinstance(value, str) and value.strip():
                yield value
            else:
                missing = [missing[0] + 1, missing[1]] if missing else [1, row.number]
    except DataError as error:
        note(f"{error}; what follows is left out")
    for what, found in (
        (f"rows without a path in {table.columns[column]}", missing),
        (f"rows of more than {len(table.columns)} fields", wrong),
    ):
        if found:
            first = table.where(found[1])
            note(f"{table.path}: {what} are left out: {found[0]}, the first is {first}")


def is_table(path: str) -> bool:
    """Check whether a file name has the suffix of a list with columns, such as `.csv`."""
    return os.path.splitext(path)[1].lower() in TABLES
