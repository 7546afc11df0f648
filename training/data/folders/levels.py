"""Pass through the folders above the classes: an archive's top folder, `images/` and the like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from training.data.folders.part_names import is_container, part_of
from training.data.folders.photo_tree import PhotoFolder

_STRAY: Final = 0.1
"""Largest share of photos beside the only folder with photos below which this is looked into; one
photo is allowed in any case."""


def levels(tree: PhotoFolder) -> Iterator[PhotoFolder]:
    """Yield the data folder and those below it, down to the one where classes or parts begin.

    These are an archive's top folder, `images/` and the like: the only folder with photos.
    """
    folder = tree
    yield folder
    while _passes_through(folder) and len(folder.children) == 1:
        (only,) = folder.children
        hidden = any(other.unread() for other in folder.folders.values() if other is not only)
        if hidden or part_of(only.name) or not _passes_through(only):
            break
        folder = only
        yield folder


def _passes_through(folder: PhotoFolder) -> bool:
    """Check whether almost all photos lie in the folders of a folder: a stray one is no class."""
    return bool(folder.children) and len(folder.photos) <= max(1, folder.total * _STRAY)


def inside(folder: PhotoFolder, classes: Iterable[str] = ()) -> PhotoFolder:
    """Return the folder of a part in which its classes or photos begin.

    That is the folder itself, or one in it: `train/images/`, `seg_train/seg_train/`.

    Args:
        folder: Folder of the part.
        classes: Names of classes, which are no such folders.
    """
    part, known = part_of(folder.name), set(classes)
    while _passes_through(folder) and len(folder.children) == 1:
        (only,) = folder.children
        again = is_container(only.name) or part_of(only.name) == part
        if only.name in known or not (again or _passes_through(only)):
            break
        folder = only
    return folder
