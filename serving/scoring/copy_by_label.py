"""Copy each scored image into a folder for its predicted label (`fledge score --copy-to`)."""

from __future__ import annotations

import os
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
"""Name of the subfolder for images that could not be scored."""

_LONGEST: Final = 240
"""Bytes of the longest name that is created. File systems allow 255; the name of a temporary file
has 9 more, and a repeated name gets a number."""


def copy_by_label(folder: Path, rows: Iterable[ScoreRow], protocols: Sequence[str] = ()) -> str:
    """Copy the image of each table row to `folder`/LABEL/NAME.

    An image without a predicted label is copied to `folder`/_errors/NAME. If several images have
    the same target path, a number is added to the name. The same rows always give the same paths,
    so a second call overwrites the files of the first.

    Args:
        folder: The target folder.
        rows: Rows of the table of scores.
        protocols: Protocols that addresses of images may have, such as "s3".

    Returns:
        A line to print, with the number of copied images.

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
    """Return the path to which the image of a row is copied, and add the path to `names`.

    `names` has the paths returned for earlier rows. The new path differs from all of them.
    """
    parent = folder / (ERRORS if row.label is None else _folder_name(row.label))
    name = Path(row.path.rpartition("::")[2]).name.replace("\0", "_")
    if name in ("", ".."):
        name = "image"
    wanted = target = parent / _shortened(Path(name).stem, Path(name).suffix)
    while target in names:
        names[wanted] += 1
        target = parent / f"{wanted.stem}-{names[wanted]}{wanted.suffix}"
    names[target] = 1
    return target


def _folder_name(label: str) -> str:
    """Return the label with characters that are invalid in a folder name replaced by `_`."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ")
    return _shortened(name or "_")


def _shortened(stem: str, suffix: str = "") -> str:
    """Return the name of a file or folder, with its stem cut so that the name is short enough."""
    if len(os.fsencode(suffix)) > _LONGEST // 2:
        stem, suffix = stem + suffix, ""
    stem = stem[:_LONGEST]
    while len(os.fsencode(stem + suffix)) > _LONGEST:
        stem = stem[:-1]
    return stem + suffix
