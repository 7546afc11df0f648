"""Copy each scored image into a folder for its predicted label (`fledge score --copy-to`)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from serving.errors import FledgeError, OptionError, WorkError
from serving.imaging import formats
from serving.imaging.formats import FORMATS
from serving.inputs.file_kinds import MARK
from serving.inputs.sources import Reader
from serving.scoring.rows import ScoreRow
from serving.utils.file_names import UniqueNames, folder_names, longest_name
from serving.utils.files import atomic_write

ERRORS: Final = "_errors"
"""Name of the subfolder for images that could not be scored."""

_LONGEST_PATH: Final = 4096 - 2 * 256 - 1
"""Bytes of the longest target folder: below it are a label and a name of 255 bytes each."""

_SHORT_SIGNATURES: Final = (b"BM", b"II", b"MM")
"""First bytes of images with which a text may begin, too."""


def check_copies(folder: Path, labels: Sequence[str]) -> None:
    """Check that images can be copied into a folder for each label. Called before any is scored.

    Args:
        folder: The target folder, which may not exist yet.
        labels: Labels of the model.

    Raises:
        OptionError: The path is too long, or a folder of a label can't be one.
    """
    if len(os.fsencode(folder)) > _LONGEST_PATH:
        raise OptionError(f"--copy-to {folder!s:.60}...: the path is too long; choose another")
    names = UniqueNames(longest_name(folder), [ERRORS])
    for name in (ERRORS, *folder_names(labels, names).values()):
        _check_folder(folder / name)


def copy_by_label(
    folder: Path,
    rows: Iterable[ScoreRow],
    protocols: Sequence[str] = (),
    *,
    labels: Sequence[str] = (),
    root: Path | None = None,
) -> str:
    """Copy the image of each table row to `folder`/LABEL/NAME, with the permissions of the image.

    An image without a predicted label is copied to `folder`/_errors/NAME. A file that is no image
    is not copied. If several images have the same target path, a number is added to the name. The
    same rows always give the same paths, so a second call overwrites the files of the first.

    A folder that is new or empty is marked as an output of Fledge (`file_kinds.MARK`): a search of
    a folder above it passes it over.

    Args:
        folder: The target folder.
        rows: Rows of the table of scores.
        protocols: Protocols that addresses of images may have, such as "s3".
        labels: Labels of the model, which determine the names of the folders. Other labels in
            `rows` follow in their order.
        root: Folder that must contain all local images. None: no limit.

    Returns:
        A line to print, with the number of copied images and the folders with other names than
        their labels.

    Raises:
        OptionError: A folder of a label is a link of another user, or a file.
        WorkError: A file can't be written.
    """
    longest = longest_name(folder)
    taken = UniqueNames(longest, [ERRORS])
    folders = folder_names(labels, taken)
    names: dict[str, UniqueNames] = {}
    copied = missing = foreign = 0
    reader = Reader(protocols, root)
    try:
        marked = folder.exists() and any(folder.iterdir())
        for row in rows:
            if row.label is not None and row.label not in folders:
                folders |= folder_names([row.label], taken)
            parent = ERRORS if row.label is None else folders[row.label]
            name = _add_name(names.setdefault(parent, UniqueNames(longest)), row.path)
            try:
                data, mode = reader.read(row.path)
            except FledgeError:  # an unreadable image, whose row in the table is an error
                missing += 1
                continue
            if not _is_image(data):
                foreign += 1
                continue
            if not marked:
                _mark(folder)
                marked = True
            _write(folder / parent / name, data, mode)
            copied += 1
    except OSError as error:
        raise WorkError(f"--copy-to {folder}: {error.strerror or error}") from error
    finally:
        reader.close()
    notes = [f"copied {copied} images to {folder}"]
    notes += [f"{missing} could not be read"] if missing else []
    notes += [f"{foreign} are no images and were not copied"] if foreign else []
    renamed = [f"{label!r} is in {name}" for label, name in folders.items() if label != name]
    return "; ".join(notes + renamed)


def _add_name(names: UniqueNames, path: str) -> str:
    name = Path(path.rpartition("::")[2]).name.replace("\0", "_")
    if name in ("", ".."):
        name = "image"
    return names.add(Path(name).stem, Path(name).suffix)


def _write(target: Path, data: bytes, mode: int | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_folder(target.parent)
    with atomic_write(target, 0o666 if mode is None else 0o600) as partial:
        partial.write_bytes(data)
        if mode is not None:
            partial.chmod(mode)


def _mark(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / MARK) as partial:
        partial.write_text(json.dumps({"made_by": "fledge score --copy-to"}) + "\n")


def _check_folder(folder: Path) -> None:
    """Check that a folder does not exist, or is one, and no link that another user has made."""
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OptionError(f"--copy-to {folder}: {error.strerror or error}") from error
    if stat.S_ISLNK(status.st_mode) and status.st_uid != os.geteuid():
        raise OptionError(f"--copy-to {folder} is a link of another user; remove it")
    if not folder.is_dir():
        raise OptionError(f"--copy-to {folder} is no folder; remove it, or choose another place")


def _is_image(data: bytes) -> bool:
    """Check whether a file is an image, of a served format or not, by its first bytes."""
    if data.startswith(_SHORT_SIGNATURES):
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    return bool(formats.served(data) or formats.unsupported(data))
