"""Where the images to score lie: a folder, one file, or a text file of paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from serving import images
from serving.errors import BrokenImage, DataError, TooLarge

LIST_SUFFIX: Final = ".txt"

# A file with more bytes than the largest picture has in RGBA is no photo: it is not read at all.
_MAX_FILE: Final = 4 * images.MAX_PIXELS


@dataclass(frozen=True)
class Found:
    """Inputs in the order in which they are scored.

    paths: openable from the current folder, one for every input. Bytes of a name that are not
        UTF-8 are kept as surrogates, as Python's file functions take and give them.
    unreadable: folders that could not be searched, each with the reason.
    """

    paths: list[str]
    unreadable: list[str] = field(default_factory=list)


def find(inputs: Path) -> Found:
    """Find the images of `inputs`.

    A folder is searched below and through links; names of images end as `images.SUFFIXES` has it;
    hidden files, macOS's `._x.jpg` among them, are left out. In each folder the order is natural:
    `2.jpg` before `10.jpg`. A `.txt` file lists one path a line, relative to the current folder,
    and each line is an input, there or not. Any other file is one image.

    Raises:
        DataError: Nothing there, or no images in it.
    """
    if inputs.is_dir():
        unreadable: list[str] = []
        paths = list(_walk(os.fspath(inputs), (), unreadable))
        if not paths:
            why = f" ({unreadable[0]})" if unreadable else ""
            endings = ", ".join(sorted(images.SUFFIXES))
            raise DataError(f"{inputs}: no images found{why}; looked for files ending in {endings}")
        return Found(paths, unreadable)
    if not inputs.exists():
        raise DataError(f"{inputs}: not there; give a folder, an image or a {LIST_SUFFIX} list")
    if inputs.suffix.lower() == LIST_SUFFIX:
        return Found(_lines(inputs))
    return Found([os.fspath(inputs)])


def load(path: str) -> bytes:
    """The bytes of one input.

    Raises:
        BrokenImage: It can't be read.
        TooLarge: No photo is that big.
    """
    try:
        # Opening a pipe would wait for ever.
        if not os.path.isfile(path):
            os.stat(path)  # says what is wrong, where something is
            raise BrokenImage("not a file")
        size = os.path.getsize(path)
        if size > _MAX_FILE:
            raise TooLarge(f"{size} bytes are more than the {_MAX_FILE} allowed")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BrokenImage(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in a line of a list
        raise BrokenImage(f"not a path: {error}") from error


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorting key: numbers by value, all else by code point, equal values by spelling."""
    parts = re.split(r"([0-9]+)", name)
    return [
        (int(part) if i % 2 else 0, "" if i % 2 else part) for i, part in enumerate(parts)
    ], name


def _walk(folder: str, above: tuple[tuple[int, int], ...], unreadable: list[str]) -> Iterator[str]:
    """Images below `folder`; `above` are the folders on the way here, by which loops are known."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            seen = sorted(entries, key=lambda entry: natural(entry.name))
    except OSError as error:
        unreadable.append(f"{folder}: {error.strerror or error}")
        return
    for entry in seen:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, (*above, here), unreadable)
        elif os.path.splitext(entry.name)[1].lower() in images.SUFFIXES:
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself: an input that can't be read


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    paths = [line for line in lines if line.strip()]
    if not paths:
        raise DataError(f"{path}: lists no images; write one path a line")
    return paths
