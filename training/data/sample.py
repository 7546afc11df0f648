"""Built-in sample dataset: computer-drawn flowers for tests and demos without downloads.

    >>> folder = cached_sample()  # one folder per class: daisy/0000.jpg, daisy/0001.jpg, ...

Classes differ in shape, not in colour (see `training.data.flowers`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from serving.errors import DataError, WorkError
from serving.utils.files import check_folder, make_user_cache_folder, user_cache_folder
from serving.utils.process import is_running
from training.data.flowers import CLASSES, paint

__all__ = ["CLASSES", "PER_CLASS", "cached_sample", "contact_sheet", "paint", "write_sample"]

# Part of the cache folder's name. Increase it with every change that alters a picture.
VERSION = 1
PER_CLASS = 120
_SIZE = 160
_QUALITY = 90


def write_sample(
    folder: Path, *, per_class: int = PER_CLASS, seed: int = 0, size: int = _SIZE
) -> Path:
    """Write the dataset as one folder of JPEG files per class: `folder/CLASS/0000.jpg`.

    The files are first written to a hidden folder next to `folder`. This folder is renamed at the
    end. Therefore `folder` is either complete or absent. The same arguments give the same pictures.

    Args:
        folder: Folder to create; must not exist.
        per_class: Number of pictures per class, at least 1.
        seed: Random seed of the pictures, 0 or more.
        size: Side of a picture in pixels, at least 32.

    Returns:
        `folder`.

    Raises:
        DataError: `folder` exists, or `per_class`, `seed` or `size` is too small.
        WorkError: The files can't be written.
    """
    minimums = {"per_class": (per_class, 1), "seed": (seed, 0), "size": (size, 32)}
    for name, (value, low) in minimums.items():
        if value < low:
            raise DataError(f"--{name.replace('_', '-')} {value}: use {low} or more")
    if folder.exists() or folder.is_symlink():
        raise DataError(f"{folder} exists already; name a new folder or remove it")
    check_folder(folder, "")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_partials(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()  # fails where something else has the name, such as a link
        for label in CLASSES:
            (partial / label).mkdir()
        for label, index in _names(per_class):
            picture = paint(label, _rng(seed, label, index), size)
            picture.save(partial / label / f"{index:04d}.jpg", quality=_QUALITY)
        try:
            partial.rename(folder)
        except OSError as error:
            if folder.exists():
                raise DataError(f"{folder} was made by another process meanwhile") from error
            raise
    except OSError as error:  # a failed write names no file
        raise WorkError(f"{folder} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def cached_sample(seed: int = 0) -> Path:
    """Return the folder of the sample dataset in the user's cache; write it at first use.

    Several processes may call this function at the same time. They all return the same folder.

    Raises:
        DataError: `seed` is negative.
    """
    recipe = (VERSION, CLASSES, PER_CLASS, _SIZE, _QUALITY, seed)
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    folder = user_cache_folder() / f"sample-v{VERSION}-{digest}"
    if folder.is_dir():
        _remove_stale_partials(folder)
    else:
        make_user_cache_folder()
        try:
            write_sample(folder, seed=seed)
        except DataError:
            if not folder.is_dir():
                raise
    return folder


def contact_sheet(columns: int = 8, size: int = 128, seed: int = 0) -> Image.Image:
    """Draw the first pictures of every class on one sheet: a line of pictures below the class name.

    Args:
        columns: Number of pictures per class.
        size: Side of each picture in pixels.
        seed: Random seed of the pictures, 0 or more.

    Returns:
        An RGB image, `columns * size` pixels wide.
    """
    band = max(size // 6, 12)
    sheet = Image.new("RGB", (columns * size, len(CLASSES) * (size + band)), (250, 247, 240))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=0.7 * band)
    for row, label in enumerate(CLASSES):
        top = row * (size + band)
        pen.text((band // 3, top + band // 2), label, fill=(60, 54, 50), font=font, anchor="lm")
        for column in range(columns):
            picture = paint(label, _rng(seed, label, column), size)
            sheet.paste(picture, (column * size, top + band))
    return sheet


def _remove_stale_partials(folder: Path) -> None:
    """Remove hidden folders that `write_sample` left behind when it was killed."""
    head = f".{folder.name}.partial-"
    for path in folder.parent.glob(f"{glob.escape(head)}*"):
        process = path.name.removeprefix(head)
        # A folder with this process's own id is left from an earlier process with the same id.
        if process.isdecimal() and (int(process) == os.getpid() or not is_running(int(process))):
            shutil.rmtree(path, ignore_errors=True)


def _names(per_class: int) -> Iterator[tuple[str, int]]:
    for label in CLASSES:
        for index in range(per_class):
            yield label, index


def _rng(seed: int, label: str, index: int) -> np.random.Generator:
    """Return the random generator of one picture. It does not depend on other pictures."""
    return np.random.default_rng([seed, CLASSES.index(label), index])
