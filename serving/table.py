"""The table of scores: one row for every input, written aside and renamed when whole."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from serving.errors import FledgeError, OptionError, WorkError
from serving.files import check_file, write_aside


@dataclass(frozen=True)
class Row:
    """What is known of one input. The fields are the columns, in this order.

    path: as it was given or found.
    status: "ok" or "error".
    label, probability: the first of `top_k`.
    confident: None until the bundle has a threshold.
    top_k: (label, probability), best first; as JSON in CSV.
    views: how many were averaged; applied: what was done to the picture, joined by ";".
    error: "code: message", with the code that the service answers.
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

    @classmethod
    def of_answer(cls, path: str, answer: dict[str, Any]) -> Row:
        """The row of an answer as `Predictor.answer` shapes it."""
        top_k = tuple((item["label"], item["probability"]) for item in answer["predictions"])
        label, probability = top_k[0]
        applied = ";".join(answer["applied"])
        return cls(
            path, "ok", label, probability, answer["confident"], top_k, answer["views"], applied
        )

    @classmethod
    def of_error(cls, path: str, error: FledgeError) -> Row:
        """The row of an input that has no answer."""
        message = " ".join(str(error).split())
        return cls(path, "error", error=f"{error.code}: {message}")


COLUMNS: Final = tuple(item.name for item in fields(Row))


def csv_line(values: list[Any]) -> str:
    """One record; fields with commas, quotes and line breaks are quoted."""
    buffer = io.StringIO()
    # The module quotes a lone \r only where the line's own end has one.
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _csv_row(row: Row) -> str:
    top_k = json.dumps(row.top_k, ensure_ascii=False) if row.top_k else ""
    confident = "" if row.confident is None else str(row.confident).lower()
    return csv_line(
        [
            row.path,
            row.status,
            row.label,
            row.probability,
            confident,
            top_k,
            row.views,
            row.applied,
            row.error,
        ]
    )


def _json_row(row: Row) -> str:
    # ASCII only: a name that is not UTF-8 stays valid JSON.
    return json.dumps({name: getattr(row, name) for name in COLUMNS}) + "\n"


@dataclass(frozen=True)
class Format:
    """How a table is written.

    head: what stands before the rows; line: one row, line break included.
    """

    head: str
    line: Callable[[Row], str]


FORMATS: Final = {
    ".csv": Format(csv_line(list(COLUMNS)), _csv_row),
    ".jsonl": Format("", _json_row),
}


class Table:
    """A file of rows that exists under its name when it is whole, and never before.

    A context manager: leaving it by an exception leaves an older table as it was.
    """

    def __init__(self, out: Path) -> None:
        """Open the file aside.

        Raises:
            OptionError: An unknown suffix, or a place where nothing can be written.
        """
        found = FORMATS.get(out.suffix.lower())
        if found is None:
            raise OptionError(f"--out {out}: use a name that ends in {' or '.join(FORMATS)}")
        check_file(out)
        self._format, self._out = found, out
        self._stack = contextlib.ExitStack()
        try:
            aside = self._stack.enter_context(write_aside(out))
            # Bytes of file names that are not UTF-8 go through unchanged.
            self._file = aside.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise OptionError(
                f"--out {out}: can't write in {out.parent}: {error.strerror or error}"
            ) from error

    def __enter__(self) -> Table:
        """Write what stands before the rows."""
        self._guard(lambda: self._file.write(self._format.head))
        return self

    def append(self, row: Row) -> None:
        """Write one row.

        Raises:
            WorkError: The disk is full or gone.
        """
        self._guard(lambda: self._file.write(self._format.line(row)))

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
        self._file.close()
        self._stack.close()

    def _discard(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # what it still held is not wanted
            self._file.close()
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._discard(error)
            raise WorkError(f"--out {self._out}: {error.strerror or error}") from error
