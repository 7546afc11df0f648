"""Read a table of scores (CSV, JSON lines or Parquet) as a stream of rows.

The columns `top_k` and `probabilities` are parsed only when the methods of those names are called.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.errors import DataError, OptionError
from serving.imaging.tta import Probabilities
from serving.scoring.row_writers import unescape_formula
from serving.scoring.summary import read_csv_safe
from serving.scoring.table_folder import part_files
from serving.tables.reader import EmptyTable, open_table
from serving.utils.files import utf8_path
from serving.utils.optional_packages import require
from serving.utils.regular_files import limited_lines

_REQUIRED: Final = ("path", "status", "label", "probability")
_COLUMNS: Final = (*_REQUIRED, "confident", "top_k", "error", "probabilities")
_ONE: Final = 1 + 1e-6
"""Largest accepted probability, because rounding can make a mean slightly larger than 1."""


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """One row of a table of scores: the result for one image.

    Attributes:
        where: File and line of the row, for error messages.
        path: Name of the scored image.
        code: Error code; None if the image was scored.
        label: Predicted label; "" if the row has an error.
        probability: Probability of `label`.
        confident: Whether the probability reaches the bundle's threshold; None if it has no
            threshold.
    """

    where: str
    path: str
    code: str | None = None
    label: str = ""
    probability: float = 0.0
    confident: bool | None = None
    _top_k: Any = None
    _probabilities: Any = None

    def top_k(self) -> tuple[tuple[str, float], ...]:
        """Return the most probable classes as (label, probability) pairs, most probable first.

        If the table has no column `top_k`, only the predicted label is returned.

        Raises:
            DataError: The column is not a list of labels and probabilities.
        """
        listed = _parsed(self._top_k, self.where, "top_k")
        if not listed:
            return ((self.label, self.probability),)
        try:
            pairs = [
                (item["label"], item["probability"]) if isinstance(item, dict) else item
                for item in listed
            ]
            return tuple(
                (str(label), parse_probability(value, self.where)) for label, value in pairs
            )
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self.where}: top_k is no list of labels and probabilities") from None

    def probabilities(self) -> Probabilities | None:
        """Return the probabilities of all classes in the model's order, float64 [C].

        None if the table has no such column.

        Raises:
            DataError: The column is not a list of numbers from 0 to 1.
        """
        listed = _parsed(self._probabilities, self.where, "probabilities")
        if listed is None:
            return None
        try:
            values = np.asarray(listed, np.float64)
        except (TypeError, ValueError, OverflowError):
            values = np.empty(0)
        if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= _ONE)).all():
            raise DataError(f"{self.where}: probabilities is no list of numbers from 0 to 1")
        return np.minimum(values, 1)


def read(path: Path) -> Iterator[ParsedRow]:
    """Yield the rows of a table of scores, in order.

    Texts in CSV that `--csv-safe` escaped are given as they were.

    Args:
        path: A `.csv`, `.jsonl` or `.parquet` file, or a folder of Parquet files written by `fledge
            score`.

    Raises:
        OptionError: The suffix of the file is unknown, or the file is Parquet and pyarrow is not
            installed.
        DataError: The file does not exist, is truncated, or is not a table of scores.
    """
    if path.is_dir() and part_files(path):
        for part in part_files(path):
            yield from read(part)
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"{path}: no table of scores; use one in {', '.join(_READERS)}")
    escaped = reader is _csv_rows and read_csv_safe(path)
    try:
        for where, values in reader(path):
            yield _row(f"{path}, {where}", _unescaped(values) if escaped else values)
    except FileNotFoundError:
        raise DataError(f"{path}: not there; make one with `fledge score`") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _unescaped(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the texts as they were before `fledge score --csv-safe` escaped them."""
    return {name: unescape_formula(text) for name, text in values.items()}


def _row(where: str, values: Mapping[str, Any]) -> ParsedRow:
    for column in _REQUIRED:
        if column not in values:
            have = ", ".join(map(repr, values)) or "none"
            raise DataError(f"{where}: no column {column!r} among {have}; see `fledge score`")
    path, status, label = (values[name] for name in ("path", "status", "label"))
    if status == "error":
        code = str(values.get("error") or "").partition(":")[0]
        return ParsedRow(where, str(path), code or "error")
    if status != "ok" or not label:
        wrong = f"status is {status!r}, not ok or error" if status != "ok" else "ok, but no label"
        raise DataError(f"{where}: {wrong}; is the table from `fledge score`?")
    return ParsedRow(
        where,
        str(path),
        None,
        str(label),
        parse_probability(values["probability"], where),
        {"true": True, "false": False}.get(str(values.get("confident")).lower()),
        values.get("top_k"),
        values.get("probabilities"),
    )


def parse_probability(value: Any, where: str) -> float:
    """Convert a value to a probability.

    A value up to 1e-6 above 1 comes from rounding and is returned as 1.

    Args:
        value: A number or its text.
        where: File and line, for the error message.

    Raises:
        DataError: The value is not a number from 0 to 1.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= _ONE:
        raise DataError(f"{where}: {value!r:.60} is no probability; use a number from 0 to 1")
    return min(number, 1.0)


def _parsed(value: Any, where: str, column: str) -> Any:
    if value is None or value == "":
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {column} is no JSON: {error}") from None


Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Iterator of pairs: position such as "line 3", and a mapping from column name to value."""


def _csv_rows(path: Path) -> Rows:
    try:
        table = open_table(path)
    except EmptyTable:
        return
    for row in table.rows(range(len(table.columns))):
        where = table.where(row.number)
        if row.fields != len(table.columns):
            raise DataError(
                f"{path}, {where}: {row.fields} fields, and the first line names "
                f"{len(table.columns)} columns; is the file whole?"
            )
        yield where, dict(zip(table.columns, row.values, strict=True))


def _json_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(limited_lines(file), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also invalid UTF-8
                raise DataError(
                    f"{path}, line {number}: no JSON: {error}; is the file whole?"
                ) from None
            if not isinstance(values, dict):
                raise DataError(f"{path}, line {number}: no JSON object; see `fledge score`")
            yield f"line {number}", values


def _parquet_rows(path: Path) -> Rows:
    require("pyarrow", f"{path}: Parquet", "pip install pyarrow")
    pq: Any = importlib.import_module("pyarrow.parquet")
    done = 0
    try:
        with utf8_path(path) as name, pq.ParquetFile(name) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for number, values in enumerate(batch.to_pylist(), done + 1):
                    yield f"row {number}", values
                done += len(batch)
    # ValueError is the base class of pyarrow's errors except OSError. A negative number of rows is
    # a SystemError.
    except (ValueError, SystemError) as error:
        raise DataError(f"{path}: no Parquet file that can be read: {error}") from error


_READERS: Final[dict[str, Callable[[Path], Rows]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
