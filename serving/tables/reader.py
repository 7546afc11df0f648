"""Read tables of paths and labels: the one reader for data, splits, labels and lists.

    suffix                        table                 row number
    .csv .tsv .txt and others     text with delimiters  line
    .jsonl .ndjson                JSON lines            line
    .parquet                      Parquet               row

How a text table is written is recognised by `serving.tables.dialect`. The first record names
the columns, unless it has the name of an image; then the columns are called 1, 2, and so on. Tables
are read as a stream.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from serving.errors import DataError
from serving.tables.columns import has_usual_name, names_columns
from serving.tables.dialect import HEAD, LONGEST_FIELD, Dialect, check_text, find_dialect
from serving.utils.files import utf8_path
from serving.utils.optional_packages import require_parquet
from serving.utils.regular_files import MAX_LINE, limited_lines, open_regular, read_limited

TABLES: Final = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of tables with columns; `.txt` is a table or a list of lines, by where it is given."""

MAX_ROWS: Final = 4_000_000
"""Largest number of rows of a table that is kept in memory."""

_LARGEST_PIPE: Final = 2**26
_STREAMS: Final = ("/dev/fd/", "/proc/self/fd/")
"""Where a shell puts the output of a command: `--labels <(command)`."""


class EmptyTable(DataError):
    """The file of a table has no record."""


class TableRecord(NamedTuple):
    """A row of a table that is not blank.

    Attributes:
        number: Line of the row (its first one), or its place in a Parquet file; both count from 1.
        values: Values of the requested columns; None where the row has none.
        fields: Number of fields of the row.
        wrong: What is wrong with the form of the row, such as more fields than columns; or "".
    """

    number: int
    values: tuple[Any, ...]
    fields: int
    wrong: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose form was recognised.

    Attributes:
        path: Path of the file, as it was given.
        columns: Names of the columns, without spaces at the ends.
        named: Whether the file names its columns.
        unit: What counts the rows: "line" or "row".
    """

    path: str
    columns: tuple[str, ...]
    named: bool
    unit: str
    _rows: Callable[[Sequence[int]], Iterator[TableRecord]]
    _unnamed: Table | None = None

    def with_first_row(self, is_photo: Callable[[str], bool]) -> Table:
        """Return the table with its first record as a row, if that names a photo and no columns.

        Args:
            is_photo: Function that checks whether a text is the name of a photo that is there.
        """
        usual = not self.named or has_usual_name(self.columns)
        if usual or self._unnamed is None or not any(map(is_photo, self.columns)):
            return self
        return self._unnamed

    def rows(self, columns: Sequence[int]) -> Iterator[TableRecord]:
        """Yield the rows that are not blank, with the values of some columns.

        Args:
            columns: Indices of the columns.

        Raises:
            DataError: The file can't be read to its end. The message names the line.
        """
        try:
            yield from self._rows(columns)
        except _CORRUPT as error:
            raise DataError(f"{self.path}: can't be read: {_reason(error)}") from error

    def where(self, number: int) -> str:
        """Return "line 3" or "row 3"."""
        return f"{self.unit} {number}"


_CORRUPT: Final = (OSError, ValueError, csv.Error, SystemError)  # SystemError: pyarrow


def open_table(path: str | os.PathLike[str], asked: Collection[str] = ()) -> Table:
    """Recognise how a table is written, and return it.

    Args:
        path: The file.
        asked: Names of columns that the user has given; where the first record has one of them, it
            names the columns.

    Raises:
        EmptyTable: The file is empty.
        DataError: The file is no table, or can't be parsed.
        OSError: The file can't be opened or read.
        OptionError: The table is Parquet, and pyarrow is not installed.
    """
    name = os.fspath(path)
    suffix = os.path.splitext(name)[1].lower()
    try:
        if suffix == ".parquet":
            return _parquet(name)
        file, head = _open(name)
        with file:
            if head.startswith(b"PAR1"):
                return _parquet(name)
            data = None if file.seekable() else head + _rest(name, file)
        if suffix in (".jsonl", ".ndjson"):
            return _json(name, check_text(name, head), data)
        return _text(name, find_dialect(name, head), data, asked)
    except (ValueError, csv.Error, SystemError) as error:
        raise DataError(f"{name}: can't be read: {_reason(error)}") from error


def limited_rows(table: Table, columns: Sequence[int]) -> Iterator[TableRecord]:
    """Yield the rows of a table that is kept in memory; see `Table.rows`.

    Raises:
        DataError: The table can't be read to its end, or has more than `MAX_ROWS` rows.
    """
    for count, row in enumerate(table.rows(columns)):
        if count == MAX_ROWS:
            raise DataError(
                f"{table.path}: more than {MAX_ROWS:,} rows, the most that are read; keep those of "
                "the photos that are used"
            )
        yield row


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file of at most 16 MiB, in the encoding that its byte-order mark states.

    Raises:
        DataError: The file is no text.
        OSError: The file can't be read, or is larger.
    """
    name = os.fspath(path)
    data = read_limited(Path(name), MAX_LINE)
    encoding = check_text(name, data[:HEAD])
    try:
        return data.decode(encoding, "surrogateescape")
    except UnicodeError as error:
        raise DataError(f"{name}: can't be read: {error}") from error


def _open(path: str) -> tuple[BinaryIO, bytes]:
    """Open a table: the file, and its first `HEAD` bytes."""
    piped = path.startswith(_STREAMS) and stat.S_ISFIFO(os.stat(path).st_mode)
    file: BinaryIO = open(path, "rb") if piped else open_regular(Path(path))  # noqa: SIM115
    try:
        return file, file.read(HEAD)
    except BaseException:
        file.close()
        raise


def _rest(path: str, file: BinaryIO) -> bytes:
    rest = file.read(_LARGEST_PIPE + 1)
    if len(rest) > _LARGEST_PIPE:
        raise DataError(f"{path}: more than {_LARGEST_PIPE:,} bytes from a pipe; write a file")
    return rest


def _lines(path: str, encoding: str, data: bytes | None) -> Iterator[str]:
    binary = open_regular(Path(path)) if data is None else io.BytesIO(data)
    # surrogateescape: names of files may be any bytes.
    with io.TextIOWrapper(binary, encoding, errors="surrogateescape", newline="") as file:
        yield from limited_lines(file, LONGEST_FIELD)


def _text(path: str, dialect: Dialect, data: bytes | None, asked: Collection[str]) -> Table:
    def records() -> Iterator[tuple[int, list[str]]]:
        lines = _lines(path, dialect.encoding, data)
        reader: Any = dialect.records(islice(lines, dialect.skip_lines, None))
        number = 0
        try:
            while True:
                number = reader.line_num + dialect.skip_lines + 1
                record = next(reader)
                if "".join(record).strip():
                    yield number, record
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {number}: {_explained(error)}") from error

    first = next(records(), (0, []))[1]
    if not first:
        raise EmptyTable(f"{path}: it is empty")
    names = [field.strip() for field in first]
    count = len(names)
    numbers = tuple(str(number) for number in range(1, count + 1))

    def rows(columns: Sequence[int], skip: int) -> Iterator[TableRecord]:
        whole = tuple(columns) == tuple(range(count))
        for number, record in islice(records(), skip, None):
            fields = len(record)
            if fields == count:
                given = record if whole else [record[at] for at in columns]
                yield TableRecord(number, tuple(given), fields)
                continue
            values = tuple(record[at] if at < fields else None for at in columns)
            more = any(field.strip() for field in record[count:])
            yield TableRecord(number, values, fields, _too_many(fields, count) if more else "")

    unnamed = Table(path, numbers, False, "line", partial(rows, skip=0))
    if not names_columns(names, asked):
        return unnamed
    return Table(path, tuple(names), True, "line", partial(rows, skip=1), unnamed)


def _too_many(fields: int, columns: int) -> str:
    names = "column" if columns == 1 else "columns"
    return f"{fields} fields, and the first line has {columns} {names}; quote what has a delimiter"


def _explained(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quote is not closed before the end of the file; is the file whole?"
    if "expected after" in str(error):
        return "text after a closing quote; write a quote within quotes twice"
    return str(error)


def _json(path: str, encoding: str, data: bytes | None) -> Table:
    twice: list[str] = []  # keys of one line

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) < len(items):
            counts = Counter(key for key, _ in items)
            twice.extend(key for key in value if counts[key] > 1)
        return value

    def objects() -> Iterator[tuple[int, object, str]]:
        decode = json.JSONDecoder(object_pairs_hook=pairs).decode
        for number, line in enumerate(_json_lines(path, encoding, data), 1):
            if not line.strip():
                continue
            twice.clear()
            try:
                value = decode(line)
                yield number, value, f"key {twice[0]!r} is there twice" if twice else ""
            except (ValueError, RecursionError):
                yield number, None, ""

    first = next(objects(), None)
    if first is None:
        raise EmptyTable(f"{path}: it is empty")
    if not isinstance(first[1], dict) or not first[1]:
        raise DataError(
            f'{path}: its first line is no JSON object, such as {{"path": "1.jpg", "label": "cat"}}'
        )
    keys = list(first[1])

    def rows(columns: Sequence[int]) -> Iterator[TableRecord]:
        names = [keys[at] for at in columns]
        for number, value, wrong in objects():
            if isinstance(value, dict):
                values = tuple(_possible(value.get(name)) for name in names)
                yield TableRecord(number, values, len(keys), wrong)
            else:
                yield TableRecord(number, (None,) * len(names), 0, "no JSON object")

    return Table(path, tuple(key.strip() for key in keys), True, "line", rows)


def _json_lines(path: str, encoding: str, data: bytes | None) -> Iterator[str]:
    binary = open_regular(Path(path)) if data is None else io.BytesIO(data)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(binary, encoding, errors="surrogateescape", newline="\n") as file:
        yield from limited_lines(file)


def _possible(value: object) -> object:
    """Return None for a text with lone surrogates, which JSON can have and no file or table can."""
    if isinstance(value, str) and not value.isascii():
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            return None
    return value


def _parquet(path: str) -> Table:
    require_parquet()
    parquet: Any = importlib.import_module("pyarrow.parquet")
    with utf8_path(Path(path)) as name, parquet.ParquetFile(name) as file:
        names = [str(name) for name in file.schema_arrow.names]

    def rows(columns: Sequence[int]) -> Iterator[TableRecord]:
        chosen = [names[at] for at in columns]
        number = 0
        with utf8_path(Path(path)) as name, parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1000, columns=list(dict.fromkeys(chosen))):
                lists = [batch.column(name).to_pylist() for name in chosen]
                for values in zip(*lists, strict=True):
                    number += 1
                    decoded = (os.fsdecode(v) if isinstance(v, bytes) else v for v in values)
                    yield TableRecord(number, tuple(decoded), len(names))

    if not names:
        raise DataError(f"{path}: it has no columns")
    return Table(path, tuple(name.strip() for name in names), True, "row", rows)


def too_few(row: TableRecord, table: Table) -> str:
    """Describe a row that has fewer fields than the table has columns."""
    fields = "field" if row.fields == 1 else "fields"
    return f"{row.fields} {fields}, and the first line has {len(table.columns)}; is the file whole?"


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())
