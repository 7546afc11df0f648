"""Folders of links to photos: as many as are asked for, of as few as there are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

_SUFFIXES: Final = (".jpg", ".jpeg")


def find(folder: Path) -> list[Path]:
    """The JPEGs of a folder and of those below it.

    Raises:
        SystemExit: There are none.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES]
    if not found:
        raise SystemExit(f"--photos {folder}: no JPEG in it")
    return found


def spread(photos: list[Path], count: int) -> list[Path]:
    """`count` photos spread evenly over those there are; all of them again and again for more."""
    whole, rest = divmod(count, len(photos))
    return photos * whole + [photos[i * len(photos) // rest] for i in range(rest)]


def linked(photos: list[Path], count: int, folder: Path) -> Path:
    """A folder of `count` links, in one level; kept from call to call."""
    done = folder.with_suffix(".whole")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, photo in enumerate(spread(photos, count)):
            (folder / f"{number:07}{photo.suffix.lower()}").symlink_to(photo)
        done.touch()
    return folder
