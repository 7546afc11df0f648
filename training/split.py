"""Split files: which part every photo belongs to, given by hand or as a run used it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from serving.errors import DataError

PARTS: Final = ("train", "valid", "test")


def read_split(split: Path) -> Iterator[tuple[str, str]]:
    """(path below the data folder, fold) of every row of a CSV `path,fold`.

    Raises:
        DataError: Not such a file; names the line.
    """
    try:
        # utf-8-sig: spreadsheets write a byte-order mark.
        with split.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if not {"path", "fold"} <= set(reader.fieldnames or ()):
                raise DataError(f"{split}: the first line must be 'path,fold'")
            for row in reader:
                path, fold = row["path"] or "", (row["fold"] or "").strip()
                line = f"{split}, line {reader.line_num}"
                if fold not in PARTS and not fold.isdecimal():
                    raise DataError(f"{line}: fold {fold!r} is not train, valid, test or a number")
                if len(Path(path).parts) < 2 or Path(path).is_absolute() or ".." in path.split("/"):
                    raise DataError(f"{line}: path {path!r} is not CLASS/photo below the folder")
                yield path, fold
    except FileNotFoundError:
        raise DataError(f"--split {split}: no such file; make a CSV 'path,fold'") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"--split {split} can't be read: {error}") from error
