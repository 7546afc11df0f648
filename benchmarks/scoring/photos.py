"""Folders with a given number of symbolic links to photos, which repeat if there are fewer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

_SUFFIXES: Final = (".jpg", ".jpeg")


def find(folder: Path) -> list[Path]:
    """The JPEGs of a folder and its subfolders.

    Raises:
        SystemExit: There are none.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES]
    if not found:
        raise SystemExit(f"--photos {folder}: no JPEG in it")
    return found


def spread(photos: list[Path], count: int) -> list[Path]:
    """`count` photos spread evenly over `photos`, which are repeated if there are fewer."""
    repeats, rest = divmod(count, len(photos))
    return photos * repeats + [photos[i * len(photos) // rest] for i in range(rest)]


def link(photos: list[Path], count: int, folder: Path) -> Path:
    """Create a flat folder of `count` links, or reuse it."""
    complete = folder.with_suffix(".whole")
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, photo in enumerate(spread(photos, count)):
            (folder / f"{number:07}{photo.suffix.lower()}").symlink_to(photo)
        complete.touch()
    return folder
