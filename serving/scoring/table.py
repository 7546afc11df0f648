"""The table of scores: one row for every input, written aside and renamed when whole."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import FledgeError, OptionError, WorkError
from serving.utils.files import check_file, write_aside
from serving.utils.optional_packages import require

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScoreRow:
    """What is known of one input. The fields are the columns, in this order.

    path: as it was given or found.
    status: "ok" or "error".
    label, probability: the first of `top_k`.
    confident: None until the bundle has a threshold.
    top_k: (label, probability), best first; as JSON in CSV.
    views: how many were averaged; applied: what was done to the picture, joined by ";".
    error: "code: message", with the code that the service answers.
    probabilities: of all classes, in the order of the model's labels; where asked for.
    """

    path: str
    status: str
    label: str | None = None
    probability: float | None = None
    confident: bool | None = None
    top_k: tuple[tuple[str, float], ...] = ()
    views: int | None = None
    applied: str = ""
    error: str = ""
    probabilities: tuple[float, ...] | None = None

    @classmethod
    def of_answer(
        cls, path: str, answer: dict[str, Any], probabilities: Sequence[float] | None = None
    ) -> ScoreRow:
        """The row of an answer as `Predictor.answer` shapes it."""
        top_k = tuple((item["label"], item["probability"]) for item in answer["predictions"])
        label, probability = top_k[0]
        applied = ";".join(answer["applied"])
        every = None if probabilities is None else tuple(probabilities)
        confident, views = answer["confident"], answer["views"]
        return cls(
            path, "ok", label, probability, confident, top_k, views, applied, probabilities=every
        )

    @classmethod
    def of_error(cls, path: str, error: FledgeError) -> ScoreRow:
        """The row of an input that has no answer."""
        message = " ".join(str(error).split())
        return cls(path, "error", error=f"{error.code}: {message}")

    def to_json(self) -> str:
        """A line; ASCII only, so that a name that is not UTF-8 stays valid JSON."""
        return json.dumps(vars(self)) + "\n"

    @classmethod
    def from_json(cls, line: str) -> ScoreRow:
        """The inverse of `to_json`."""
        values = json.loads(line)
        every = values["probabilities"]
        values["probabilities"] = None if every is None else tuple(every)
        values["top_k"] = tuple((label, probability) for label, probability in values["top_k"])
        return cls(**values)


PROBABILITIES: Final = "probabilities"
COLUMNS: Final = tuple(item.name for item in fields(ScoreRow) if item.name != PROBABILITIES)


class RowWriter(Protocol):
    """A file of one format that rows are appended to."""

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        """Append rows; `features` [rows, D] where they are asked for."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


class TextWriter:
    """Lines of text."""

    def __init__(self, path: Path, head: str, line: Callable[[ScoreRow], str]) -> None:
        """`head` stands before the rows; `line` makes one of a row, line break included."""
        # Bytes of file names that are not UTF-8 go through unchanged.
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._line = line
        self._file.write(head)

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        """As `Writer`."""
        self._file.writelines(self._line(row) for row in rows)

    def close(self) -> None:
        """As `Writer`."""
        self._file.close()


def csv_line(values: Sequence[Any]) -> str:
    """One record; fields with commas, quotes and line breaks are quoted."""
    buffer = io.StringIO()
    # The module quotes a lone \r only where the line's own end has one.
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _csv(path: Path, columns: Sequence[str]) -> RowWriter:
    def field(row: ScoreRow, name: str) -> Any:
        value = getattr(row, name)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return json.dumps(value, ensure_ascii=False) if value else ""
        return value

    return TextWriter(
        path, csv_line(columns), lambda row: csv_line([field(row, name) for name in columns])
    )


def _jsonl(path: Path, columns: Sequence[str]) -> RowWriter:
    return TextWriter(
        path, "", lambda row: json.dumps({name: getattr(row, name) for name in columns}) + "\n"
    )


def _parquet(path: Path, columns: Sequence[str]) -> RowWriter:
    from serving.scoring import writers

    return writers.ParquetWriter(path, columns)


FORMATS: Final[dict[str, Callable[[Path, Sequence[str]], RowWriter]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


class TableFile:
    """A file of rows that exists under its name when it is whole, and never before.

    A context manager: leaving it by an exception leaves an older table as it was.
    """

    def __init__(self, out: Path, columns: Sequence[str] = COLUMNS) -> None:
        """Open the file aside.

        Raises:
            OptionError: As `check`; a place where nothing can be written.
        """
        check(out)
        self._out = out
        self._stack = contextlib.ExitStack()
        try:
            aside = self._stack.enter_context(write_aside(out))
            self._writer = FORMATS[out.suffix.lower()](aside, columns)
        except OSError as error:
            raise OptionError(
                f"--out {out}: can't write in {out.parent}: {error.strerror or error}"
            ) from error

    def __enter__(self) -> TableFile:
        """Nothing more."""
        return self

    def append(self, rows: Sequence[ScoreRow], features: Features | None = None) -> None:
        """Write rows, and their features [rows, D].

        Raises:
            WorkError: The disk is full or gone.
        """
        self._guard(lambda: self._writer.write(rows, features))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Rename the file when all went well, remove it otherwise."""
        if error is None:
            self._guard(self._publish)
        else:
            self._discard(error)

    def _publish(self) -> None:
        self._writer.close()
        self._stack.close()

    def _discard(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # what it still held is not wanted
            self._writer.close()
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._discard(error)
            raise WorkError(f"--out {self._out}: {error.strerror or error}") from error


def check(out: Path, *, features: bool = False) -> None:
    """Refuse a table that can't be written, before the work.

    Raises:
        OptionError: An unknown suffix; a place where nothing can be written; Parquet without
            pyarrow; features in another format.
    """
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise OptionError(f"--out {out}: use a name that ends in {', '.join(FORMATS)}")
    if features and suffix != ".parquet":
        raise OptionError(f"--embeddings go into Parquet; use --out {out.stem}.parquet")
    if suffix == ".parquet":
        require("pyarrow", "Parquet", "pip install 'fledge[parquet]'; or use .csv")
    check_file(out)
