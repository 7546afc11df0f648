"""Write the table of scores as one file. The file appears at its path only when it is complete."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final

from serving.errors import OptionError, WorkError
from serving.scoring.row_writers import WRITERS, RowWriter, csv_writer
from serving.scoring.rows import COLUMNS, Features, ScoreRow
from serving.terminal import quote_path
from serving.utils.files import atomic_write, check_file
from serving.utils.optional_packages import require_parquet

_OF_THE_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Numbers of errors that another path on the same disk would have, too."""


class AtomicTable:
    """Base class of `TableFile` and `TableFolder`: a table that is written to a temporary path.

    A context manager. At the end of the `with` block, the temporary path is renamed to the final
    path. If the block raises an exception, the temporary path is removed, and an existing table is
    unchanged.
    """

    def __init__(
        self,
        out: Path,
        temporary: AbstractContextManager[Path],
        writer: Callable[[Path], RowWriter],
    ) -> None:
        """Create the temporary path, and open a writer there.

        Args:
            out: Final path of the table.
            temporary: Context manager that yields the temporary path, and renames it to `out` on
                exit.
            writer: Function that opens a writer at the temporary path.

        Raises:
            OptionError: The temporary path can't be written.
            WorkError: The disk is full or broken.
        """
        self._out = out
        try:
            with contextlib.ExitStack() as stack:
                self._writer = writer(stack.enter_context(temporary))
                self._stack = stack.pop_all()
        except OSError as error:
            kind = WorkError if error.errno in _OF_THE_DISK else OptionError
            raise kind(
                f"--out {out}: can't write in {out.parent}: {error.strerror or error}"
            ) from error

    def append(self, rows: Sequence[ScoreRow], features: Features | None = None) -> None:
        """Append rows.

        Args:
            rows: The table rows.
            features: Features of the rows, float32 [rows, D]; None if the table has no such column.

        Raises:
            WorkError: The rows can't be written, for example because the disk is full.
        """
        self._or_discard(lambda: self._writer.write(rows, features))

    def __enter__(self) -> AtomicTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._or_discard(self._publish)
        else:
            self._discard(error)

    def _publish(self) -> None:
        self._writer.close()
        self._stack.close()

    def _discard(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # data that can't be flushed is discarded anyway
            self._writer.close()
        with contextlib.suppress(OSError):  # `error` is raised, and not what follows from it
            self._stack.__exit__(type(error), error, error.__traceback__)

    def _or_discard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._discard(error)
            raise WorkError(f"--out {self._out}: {error.strerror or error}") from error


class TableFile(AtomicTable):
    """Table of scores in a `.csv`, `.jsonl` or `.parquet` file."""

    def __init__(
        self,
        out: Path,
        columns: Sequence[str] = COLUMNS,
        *,
        csv_safe: bool = False,
        csv_bom: bool = False,
    ) -> None:
        """Open a temporary file.

        Args:
            out: Final path of the table.
            columns: Names of the columns.
            csv_safe: Whether texts in CSV that a spreadsheet takes for formulas are escaped.
            csv_bom: Whether CSV begins with a byte-order mark.

        Raises:
            OptionError: The suffix is unknown, the file can't be written, or pyarrow is needed for
                Parquet and not installed.
        """
        check_table(out)
        open_writer = WRITERS[out.suffix.lower()]
        if open_writer is csv_writer:
            open_writer = partial(csv_writer, safe=csv_safe, mark=csv_bom)
        super().__init__(out, atomic_write(out), lambda path: open_writer(path, columns))


def check_table(out: Path, *, features: bool = False) -> None:
    """Check that the table can be written. Called before any image is scored.

    Args:
        out: Path of the table.
        features: Whether the table has a column of features.

    Raises:
        OptionError: The suffix is unknown, the file can't be written, pyarrow is needed for Parquet
            and not installed, or the table has features and is not Parquet.
    """
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise OptionError(f"--out {out}: use a name that ends in {', '.join(WRITERS)}")
    if features and suffix != ".parquet":
        raise OptionError(
            f"--embeddings go into Parquet; use --out {quote_path(out.with_suffix('.parquet'))}"
        )
    if suffix == ".parquet":
        require_parquet()
    check_file(out)
