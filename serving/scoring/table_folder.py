"""The table of scores as a folder of Parquet files, for what reads many machines' tables.

    scores/part-00000.parquet     the first hundred thousand rows; in order, and so on

The folder has its name when it is whole. It is no place for other files: the next table of that
name replaces it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from serving.errors import OptionError, WorkError
from serving.scoring.table import Features, ScoreRow
from serving.scoring.writers import ParquetWriter
from serving.utils.files import check_folder, sync
from serving.utils.optional_packages import require

ROWS: Final = 100_000
"""Rows of a file, or a few more."""

_NAME: Final = re.compile(r"part-[0-9]{5,}\.parquet")


class TableFolder:
    """As `table.TableFile`, of which this is the other kind."""

    def __init__(self, out: Path, columns: Sequence[str]) -> None:
        """Make the folder aside.

        Raises:
            OptionError: As `check`; a place where nothing can be written.
        """
        check(out)
        self._out, self._columns = out, columns
        self._aside = out.with_name(f".{out.name}.partial")
        self._writer: ParquetWriter | None = None
        self._files = self._rows = 0
        try:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside.mkdir()
        except OSError as error:
            raise OptionError(
                f"--out {out}: can't write in {out.parent}: {error.strerror or error}"
            ) from error

    def __enter__(self) -> TableFolder:
        """Nothing more."""
        return self

    def append(self, rows: Sequence[ScoreRow], features: Features | None = None) -> None:
        """As `Table.append`."""
        self._guard(lambda: self._append(rows, features))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Rename the folder when all went well, remove it otherwise."""
        if error is None:
            self._guard(self._publish)
        shutil.rmtree(self._aside, ignore_errors=True)

    def _append(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        if self._writer is None:
            path = self._aside / f"part-{self._files:05}.parquet"
            self._writer = ParquetWriter(path, self._columns)
            self._files += 1
        self._writer.write(rows, features)
        self._rows += len(rows)
        if self._rows >= ROWS:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            sync(self._aside / f"part-{self._files - 1:05}.parquet")
        self._writer, self._rows = None, 0

    def _publish(self) -> None:
        self._close()
        older = self._out.with_name(f".{self._out.name}.older")
        shutil.rmtree(older, ignore_errors=True)
        sync(self._aside)
        if self._out.exists():
            self._out.rename(older)
        try:
            self._aside.rename(self._out)
        except OSError:
            if older.exists():
                older.rename(self._out)
            raise
        shutil.rmtree(older, ignore_errors=True)

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            shutil.rmtree(self._aside, ignore_errors=True)
            raise WorkError(f"--out {self._out}: {error.strerror or error}") from error


def is_parts(out: Path) -> bool:
    """Whether a name is that of a folder: it has no suffix."""
    return not out.suffix


def files(folder: Path) -> list[Path]:
    """The files of a table, in order."""
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def check(out: Path) -> None:
    """Refuse a folder that can't be made, or that holds more than a table, before the work.

    Raises:
        OptionError: Says why.
    """
    require("pyarrow", "Parquet", "pip install 'fledge[parquet]'; or use .csv")
    if not out.absolute().parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}; make it first")
    check_folder(out.absolute().parent)
    if out.exists() and not (out.is_dir() and len(files(out)) == len(list(out.iterdir()))):
        raise OptionError(f"--out {out}: there, and no table; name another folder")
