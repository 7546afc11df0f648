"""The table of scores as a folder of Parquet files, an output of `--engine ray`.

    scores/part-00000.parquet     the first 100,000 rows
    scores/part-00001.parquet     the next ones, and so on

The folder appears under its name only when it is complete, and replaces an older one. It must
contain no other files.
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
from serving.utils.optional_packages import require

ROWS: Final = 100_000
"""Number of rows at which a file is closed."""

_NAME: Final = re.compile(r"part-[0-9]{5,}\.parquet")


class TableFolder(AtomicTable):
    """A folder of Parquet files."""

    def __init__(self, out: Path, columns: Sequence[str]) -> None:
        """Create a temporary folder.

        Raises:
            OptionError: `check_table_folder` fails, or the folder can't be written there.
        """
        check_table_folder(out)
        super().__init__(out, atomic_folder(out), lambda folder: _PartWriter(folder, columns))


class _PartWriter:
    """A `RowWriter` that begins a new file after `ROWS` rows."""

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
    """Whether `out` names a folder, not a file: it has no suffix."""
    return not out.suffix


def part_files(folder: Path) -> list[Path]:
    """The Parquet files of a table, in the order of their rows."""
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def check_table_folder(out: Path) -> None:
    """Check that the folder can be written, before the work.

    Raises:
        OptionError: pyarrow is missing, the parent folder is missing or not writable, or `out`
            exists and contains other files.
    """
    require("pyarrow", "Parquet", "pip install 'fledge[parquet]'; or use .csv")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}; make it first")
    check_folder(parent)
    if out.exists() and not (out.is_dir() and len(part_files(out)) == len(list(out.iterdir()))):
        raise OptionError(f"--out {out}: exists and is not a table; name another folder")
