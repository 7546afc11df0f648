"""What `fledge score` wrote, read again row by row.

A table is streamed, never held. What costs time to parse is parsed when it is asked for.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.errors import DataError, OptionError
from serving.imaging.tta import Probabilities
from serving.scoring import table_folder
from serving.utils.optional_packages import require

_NEEDED: Final = ("path", "status", "label", "probability")
_COLUMNS: Final = (*_NEEDED, "confident", "top_k", "error", "probabilities")
_LONGEST: Final = 2**27
"""Characters of one CSV field: probabilities of very many classes are long."""
_ONE: Final = 1 + 1e-6
"""A mean over views may be rounded to a little more than 1."""


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row of a table of scores.

    where: file and line, for errors. code: of its error; None where it has an answer.
    label, probability: said of the image; confident: None where the bundle has no threshold.
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
        """(label, probability), best first; the best alone where the table has no such column."""
        listed = _parsed(self._top_k, self.where, "top_k")
        if not listed:
            return ((self.label, self.probability),)
        try:
            pairs = [
                (item["label"], item["probability"]) if isinstance(item, dict) else item
                for item in listed
            ]
            return tuple((str(label), share(value, self.where)) for label, value in pairs)
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self.where}: top_k is no list of labels and probabilities") from None

    def probabilities(self) -> Probabilities | None:
        """Of every class in the order of the model's labels, float64 [C]; None where not told."""
        listed = _parsed(self._probabilities, self.where, "probabilities")
        if listed is None:
            return None
        try:
            every = np.asarray(listed, np.float64)
        except (TypeError, ValueError):
            every = np.empty(0)
        if every.ndim != 1 or not every.size or not ((every >= 0) & (every <= _ONE)).all():
            raise DataError(f"{self.where}: probabilities is no list of numbers from 0 to 1")
        return np.minimum(every, 1)


def read(path: Path) -> Iterator[ParsedRow]:
    """The rows of a table, in order; of a folder of Parquet files, too.

    Raises:
        OptionError: A suffix that no table has; Parquet without pyarrow.
        DataError: It is not there or torn, or it is no table of scores; names the line.
    """
    if path.is_dir() and table_folder.files(path):
        for part in table_folder.files(path):
            yield from read(part)
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"{path}: no table of scores; use one in {', '.join(_READERS)}")
    try:
        for where, values in reader(path):
            yield _answer(f"{path}, {where}", values)
    except FileNotFoundError:
        raise DataError(f"{path}: not there; make one with `fledge score`") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _answer(where: str, values: Mapping[str, Any]) -> ParsedRow:
    for column in _NEEDED:
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
        share(values["probability"], where),
        {"true": True, "false": False}.get(str(values.get("confident")).lower()),
        values.get("top_k"),
        values.get("probabilities"),
    )


def share(value: Any, where: str) -> float:
    """A probability.

    Raises:
        DataError: It is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= _ONE:
        raise DataError(f"{where}: {value!r} is no probability; use a number from 0 to 1")
    return min(number, 1.0)


def _parsed(value: Any, where: str, column: str) -> Any:
    if value is None or value == "":
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{where}: {column} is no JSON: {error}") from None


Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""(line, values by column)."""


def csv_rows(path: Path) -> Rows:
    """The rows of a CSV file with a line of column names.

    Raises:
        DataError: A line with fewer or more fields; quotes that do not close.
        OSError: It can't be read.
    """
    csv.field_size_limit(_LONGEST)
    # utf-8-sig: spreadsheets write a byte-order mark. Names that are not UTF-8 come as they went.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for record in reader:
                where = f"line {reader.line_num}"
                if len(record) == len(header):
                    yield where, dict(zip(header, record, strict=True))
                elif record:
                    raise DataError(
                        f"{path}, {where}: {len(record)} fields, and the first line names "
                        f"{len(header)} columns; is the file whole?"
                    )
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}; is the file whole?"
            ) from None


def _json_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:  # no UTF-8 is one, too
                raise DataError(
                    f"{path}, line {number}: no JSON: {error}; is the file whole?"
                ) from None
            if not isinstance(values, dict):
                raise DataError(f"{path}, line {number}: no JSON object; see `fledge score`")
            yield f"line {number}", values


def _parquet_rows(path: Path) -> Rows:
    require("pyarrow", f"{path}: Parquet", "pip install 'fledge[parquet]'")
    pq: Any = importlib.import_module("pyarrow.parquet")
    done = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for number, values in enumerate(batch.to_pylist(), done + 1):
                    yield f"row {number}", values
                done += len(batch)
    except ValueError as error:  # all of pyarrow's that are no OSError
        raise DataError(f"{path}: no Parquet file that can be read: {error}") from error


_READERS: Final[dict[str, Callable[[Path], Rows]]] = {
    ".csv": csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
