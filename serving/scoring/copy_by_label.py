"""Copies of the images in a folder for each label: `--copy-to`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from serving.errors import FledgeError, WorkError
from serving.inputs.sources import Reader
from serving.scoring.table import ScoreRow
from serving.utils.files import write_aside

ERRORS: Final = "_errors"
"""The folder of what could not be scored."""


def copy(folder: Path, rows: Iterable[ScoreRow], protocols: Sequence[str] = ()) -> str:
    """Copy what the rows name to folder/LABEL/NAME; what has no label to folder/_errors.

    A name that is there a second time gets a number. Called again with the same rows it writes
    the same files over. Returns a line about it.

    Raises:
        WorkError: Nothing can be written there.
    """
    taken, copied, lost = Counter[Path](), 0, 0
    reader = Reader(protocols)
    try:
        for row in rows:
            place = _place(folder, row, taken)
            try:
                data = reader.load(row.path)
            except FledgeError:  # it is gone, and the table says so
                lost += 1
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with write_aside(place) as aside:
                aside.write_bytes(data)
            copied += 1
    except OSError as error:
        raise WorkError(f"--copy-to {folder}: {error.strerror or error}") from error
    finally:
        reader.close()
    missing = f"; {lost} could not be read" if lost else ""
    return f"copied {copied} images to {folder}{missing}"


def _place(folder: Path, row: ScoreRow, taken: Counter[Path]) -> Path:
    home = folder / (ERRORS if row.label is None else _folder_name(row.label))
    name = Path(row.path.rpartition("::")[2]).name or "image"
    wanted = place = home / name
    while place in taken:
        taken[wanted] += 1
        place = home / f"{wanted.stem}-{taken[wanted]}{wanted.suffix}"
    taken[place] = 1
    return place


def _folder_name(label: str) -> str:
    """A label as the name of a folder that stays inside."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ")
    return name or "_"
