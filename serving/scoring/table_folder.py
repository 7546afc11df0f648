"""Write the table of scores as a folder of Parquet files, an output of `fledge score --engine ray`.

    scores/part-00000.parquet     about the first 100,000 rows
    scores/part-00001.parquet     the next 100,000 rows, and so on

The folder appears at its path only when it is complete, and then replaces an older table. An older
folder is only replaced if it contains no other files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from serving.errors import OptionError
from serving.scoring.row_writers import ParquetWriter
from serving.scoring.rows import Features, ScoreRow
from serving.scoring.table import AtomicTable
from serving.utils.files import atomic_folder, check_folder, sync
from serving.utils.optional_packages import require_parquet

ROWS: Final = 100_000
"""Number of rows after which the next file is started."""

_NAME: Final = re.compile(r"part-[0-9]{5,}\.parquet")


class TableFolder(AtomicTable):
    """Table of scores in a folder of Parquet files."""

    def __init__(self, out: Path, columns: Sequence[str]) -> None:
        """Create a temporary folder.

        Args:
            out: Final path of the folder.
            columns: Names of the columns.

        Raises:
            OptionError: pyarrow is not installed, the folder can't be written, or `out` exists and
                contains other files.
        """
        check_table_folder(out)
        super().__init__(out, atomic_folder(out), lambda folder: _PartWriter(folder, columns))


class _PartWriter:
    """`RowWriter` that starts a new Parquet file after every `ROWS` rows."""

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._folder, self._columns = folder, columns
        self._writer: ParquetWriter | None = None
        self._path = folder
        self._files = self._rows = 0

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        if self._writer is None:
            self._path = self._folder / f"part-{self._files:05}.parquet"
            self._writer = ParquetWriter(self._path, self._columns)
            self._files += 1
        self._writer.write(rows, features)
        self._rows += len(rows)
        if self._rows >= ROWS:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            sync(self._path)
        self._writer, self._rows = None, 0


def is_table_folder(out: Path) -> bool:
    """Check whether `out` is meant as a folder: a path without a suffix."""
    return not out.suffix


def part_files(folder: Path) -> list[Path]:
    """Return the Parquet files in a table folder, in the order of the rows."""
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def check_table_folder(out: Path) -> None:
    """Check that the table folder can be written. Called before any image is scored.

    Raises:
        OptionError: pyarrow is not installed, the parent folder does not exist or is not writable,
            or `out` exists and contains other files.
    """
    require_parquet()
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}; make it first")
    check_folder(parent)
    if out.exists() and not (out.is_dir() and len(part_files(out)) == len(list(out.iterdir()))):
        raise OptionError(f"--out {out}: exists and is not a table; name another folder")
