"""Copy each scored image into a folder for its label: `--copy-to`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from serving.errors import FledgeError, WorkError
from serving.inputs.sources import Reader
from serving.scoring.rows import ScoreRow
from serving.utils.files import atomic_write

ERRORS: Final = "_errors"
"""Folder of the images that could not be scored."""


def copy_by_label(folder: Path, rows: Iterable[ScoreRow], protocols: Sequence[str] = ()) -> str:
    """Copy each row's image to folder/LABEL/NAME, and images without a label to folder/_errors.

    A repeated name gets a number. The same rows give the same names, so a second call overwrites
    the files of the first.

    Returns:
        A line with the number of copies, to print.

    Raises:
        WorkError: A file can't be written.
    """
    names, copied, missing = Counter[Path](), 0, 0
    reader = Reader(protocols)
    try:
        for row in rows:
            target = _target(folder, row, names)
            try:
                data = reader.load(row.path)
            except FledgeError:  # an unreadable image, whose row in the table is an error
                missing += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as partial:
                partial.write_bytes(data)
            copied += 1
    except OSError as error:
        raise WorkError(f"--copy-to {folder}: {error.strerror or error}") from error
    finally:
        reader.close()
    note = f"; {missing} could not be read" if missing else ""
    return f"copied {copied} images to {folder}{note}"


def _target(folder: Path, row: ScoreRow, names: Counter[Path]) -> Path:
    """A path that no earlier row has; `names` counts the rows of each path."""
    parent = folder / (ERRORS if row.label is None else _folder_name(row.label))
    name = Path(row.path.rpartition("::")[2]).name or "image"
    wanted = target = parent / name
    while target in names:
        names[wanted] += 1
        target = parent / f"{wanted.stem}-{names[wanted]}{wanted.suffix}"
    names[target] = 1
    return target


def _folder_name(label: str) -> str:
    """A label as a valid folder name without separators."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ")
    return name or "_"
