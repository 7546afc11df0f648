"""Write the rows of a table of scores in one of three formats: CSV, JSON lines or Parquet.

Parquet needs the optional package pyarrow.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from serving.scoring.rows import FEATURES, Features, ScoreRow
from serving.utils.files import utf8_path


class RowWriter(Protocol):
    """Writer that appends rows to a table file."""

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        """Append rows.

        Args:
            rows: The table rows.
            features: Features of the rows, float32 [rows, D]; None if the table has no such column.
        """
        ...

    def close(self) -> None: ...


class TextWriter:
    """`RowWriter` for a text file with one record for each row."""

    def __init__(self, path: Path, header: str, record: Callable[[ScoreRow], str]) -> None:
        """Create the file and write the header.

        Args:
            path: The file.
            header: Text before the first row.
            record: Function that returns the text of a row, including the line break.
        """
        # surrogateescape writes the bytes of file names that are not UTF-8 unchanged.
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._record = record
        self._file.write(header)

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        self._file.writelines(self._record(row) for row in rows)

    def close(self) -> None:
        self._file.close()


class ParquetWriter:
    """`RowWriter` for a Parquet file. Each call of `write` creates one row group."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow as pa  # an optional package
        import pyarrow.parquet as pq

        types: dict[str, Any] = {
            "probability": pa.float64(),
            "confident": pa.bool_(),
            "top_k": pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())])),
            "views": pa.int32(),
            "probabilities": pa.list_(pa.float64()),
            FEATURES: pa.list_(pa.float32()),
        }
        self._pa, self._columns = pa, columns
        self._schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
        with utf8_path(path) as name:
            self._writer = pq.ParquetWriter(name, self._schema)

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        arrays = []
        for field in self._schema:
            if field.name == FEATURES:
                values = [_or_null(vector) for vector in features] if features is not None else None
            else:
                values = [_plain(getattr(row, field.name)) for row in rows]
            arrays.append(self._pa.array(values or [None] * len(rows), field.type))
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> Any:
    if isinstance(value, str):  # a Parquet string can't contain bytes that are not UTF-8
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return [{"label": label, "probability": probability} for label, probability in value]
    return value


def _or_null(vector: Any) -> Any:
    return None if vector[0] != vector[0] else vector  # nan: a broken image has no features


_FORMULA: Final = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""Start of a text that a spreadsheet takes for a formula (ASCII or full width), or of one that
`escape_formula` has returned."""

BYTE_ORDER_MARK: Final = "\ufeff"
"""First character of a CSV file that spreadsheets open as UTF-8."""


def escape_formula(text: str) -> str:
    """Return a text with an apostrophe before it if a spreadsheet would take it for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def unescape_formula(text: str) -> str:
    """Return the text of which `escape_formula` returned `text`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def csv_line(values: Iterable[Any], *, safe: bool = False) -> str:
    """Return one CSV record. Values with commas, quotes or line breaks are quoted.

    Args:
        values: Texts, numbers, or None.
        safe: Whether texts are passed through `escape_formula`.
    """
    if safe:
        values = (escape_formula(value) if isinstance(value, str) else value for value in values)
    buffer = io.StringIO()
    # csv quotes a field with a lone \r only if the line terminator contains \r.
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def csv_writer(
    path: Path, columns: Sequence[str], *, safe: bool = False, mark: bool = False
) -> RowWriter:
    """Open a writer of CSV.

    Args:
        path: The file.
        columns: Names of the columns.
        safe: Whether texts that a spreadsheet takes for formulas are escaped.
        mark: Whether the file begins with a byte-order mark.
    """

    def field(row: ScoreRow, name: str) -> Any:
        value = getattr(row, name)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return json.dumps(value, ensure_ascii=False) if value else ""
        return value

    header = BYTE_ORDER_MARK * mark + csv_line(columns)
    return TextWriter(
        path, header, lambda row: csv_line([field(row, name) for name in columns], safe=safe)
    )


def _jsonl(path: Path, columns: Sequence[str]) -> RowWriter:
    return TextWriter(
        path, "", lambda row: json.dumps({name: getattr(row, name) for name in columns}) + "\n"
    )


WRITERS: Final[dict[str, Callable[[Path, Sequence[str]], RowWriter]]] = {
    ".csv": csv_writer,
    ".jsonl": _jsonl,
    ".parquet": ParquetWriter,
}
"""Maps the suffix of a table to the class or function that opens a writer."""
