"""The embedded data set: painted flowers, made from a seed, so that no test or demo downloads.

    >>> folder = cached()  # one folder a class: daisy/0000.jpg, daisy/0001.jpg, ...

Colour decides nothing (see `training.data.flowers`): a model has to learn shapes.
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

from serving.errors import DataError
from serving.utils.files import check_folder, is_running, user_cache_folder
from training.data.flowers import CLASSES, paint

__all__ = ["CLASSES", "PER_CLASS", "cached", "contact_sheet", "paint", "write"]

# Raise it with every change that changes a picture: caches of older versions are then left alone.
VERSION = 1
PER_CLASS = 120
_SIZE = 160
_QUALITY = 90


def write(folder: Path, *, per_class: int = PER_CLASS, seed: int = 0, size: int = _SIZE) -> Path:
    """Write the data set as one folder of JPEG files a class: `folder/CLASS/0000.jpg`.

    Everything is made in a hidden folder beside it and renamed at the end: `folder` is there
    whole or not at all. The same arguments give the same pictures.

    Args:
        folder: Where; it must not exist.
        per_class: Number of pictures of each class, at least 1.
        seed: Picks the pictures, 0 or more.
        size: Side of a picture in pixels, at least 32.

    Returns:
        `folder`.

    Raises:
        DataError: `folder` exists, or a number is out of range.
    """
    least = {"per_class": (per_class, 1), "seed": (seed, 0), "size": (size, 32)}
    for name, (given, low) in least.items():
        if given < low:
            raise DataError(f"--{name.replace('_', '-')} {given}: use {low} or more")
    if folder.exists() or folder.is_symlink():
        raise DataError(f"{folder} exists already; name a new folder or remove it")
    check_folder(folder, "")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    aside = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        for label in CLASSES:
            (aside / label).mkdir(parents=True)
        for label, index in _names(per_class):
            picture = paint(label, _rng(seed, label, index), size)
            picture.save(aside / label / f"{index:04d}.jpg", quality=_QUALITY)
        try:
            aside.rename(folder)
        except OSError as error:
            if folder.exists():
                raise DataError(f"{folder} was made by another process meanwhile") from error
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def cached(seed: int = 0) -> Path:
    """The folder of the default data set in the user's cache, written at first use.

    Safe when several processes ask at once: the first to finish wins, the others use its folder.

    Raises:
        DataError: `seed` is negative.
    """
    recipe = (VERSION, CLASSES, PER_CLASS, _SIZE, _QUALITY, seed)
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    folder = user_cache_folder() / f"sample-v{VERSION}-{digest}"
    if folder.is_dir():
        _sweep(folder)
    else:
        try:
            write(folder, seed=seed)
        except DataError:
            if not folder.is_dir():
                raise
    return folder


def contact_sheet(columns: int = 8, size: int = 128, seed: int = 0) -> Image.Image:
    """The first pictures of every class on one sheet, a row a class under its name.

    Args:
        columns: Pictures in a row.
        size: Side of each in pixels.
        seed: As for `write`.

    Returns:
        An RGB picture, `columns` pictures wide.
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


def _sweep(folder: Path) -> None:
    """Remove what killed writes of `folder` left beside it; one that goes on is left alone."""
    head = f".{folder.name}.partial-"
    for path in folder.parent.glob(f"{glob.escape(head)}*"):
        process = path.name.removeprefix(head)
        # Our own number: this process has only begun, so another one had it before.
        if process.isdecimal() and (int(process) == os.getpid() or not is_running(int(process))):
            shutil.rmtree(path, ignore_errors=True)


def _names(per_class: int) -> Iterator[tuple[str, int]]:
    for label in CLASSES:
        for index in range(per_class):
            yield label, index


def _rng(seed: int, label: str, index: int) -> np.random.Generator:
    """Randomness of one picture, whatever was painted before it."""
    return np.random.default_rng([seed, CLASSES.index(label), index])
