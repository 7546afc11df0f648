"""The folders of a data set as a tree: the photos in each, and what was passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import Final

from serving.errors import DataError
from serving.inputs.folders import images_below
from serving.inputs.passed_over import PassedOver, Reason
from serving.terminal import escape
from serving.utils.natural_sort import natural_letters_first

_MOST: Final = 12
"""Folders that are shown of one folder."""
_DEPTH: Final = 4
"""Levels of folders that are shown."""

_UNREAD: Final = frozenset(
    {Reason.UNSUPPORTED_FORMAT, Reason.EMPTY_FILE, Reason.UNREADABLE_FILE, Reason.BROKEN_LINK}
)
"""Reasons that suggest that a folder was meant to hold photos."""


class PhotoFolder:
    """A folder below the data folder.

    Attributes:
        path: Path relative to the data folder, with "/"; "" for the data folder.
        photos: Names of the photos in this folder itself, in the order of training.
        folders: Folders in this folder, by name, with and without photos. Those that were passed
            over are not among them.
        passed: What was passed over in this folder itself: number by reason and detail.
        total: Number of photos in this folder and below.
    """

    def __init__(self, path: str = "") -> None:
        """Create a folder without content."""
        self.path = path
        self.photos: list[str] = []
        self.folders: dict[str, PhotoFolder] = {}
        self.passed: Counter[tuple[Reason, str]] = Counter()
        self.total = 0

    @property
    def name(self) -> str:
        """Name of the folder, without the folders above."""
        return self.path.rpartition("/")[2]

    @cached_property
    def children(self) -> list[PhotoFolder]:
        """The folders in this one that have photos, in them or below, in natural order."""
        return [folder for folder in self.sorted_folders if folder.total]

    @property
    def sorted_folders(self) -> list[PhotoFolder]:
        """All folders in this one, in natural order."""
        return sorted(self.folders.values(), key=lambda one: natural_letters_first(one.name))

    def walk(self) -> Iterator[PhotoFolder]:
        """Yield this folder and all folders below it, each before those in it.

        A stack replaces recursion, because folders may be nested deeper than Python's recursion
        limit.
        """
        stack = [self]
        while stack:
            folder = stack.pop()
            yield folder
            stack += reversed(folder.sorted_folders)

    def below(self) -> Iterator[str]:
        """Yield the paths of the photos in this folder and below, relative to the data folder.

        The photos of a folder come before those of the folders in it.
        """
        for folder in self.walk():
            prefix = f"{folder.path}/" if folder.path else ""
            yield from (prefix + name for name in folder.photos)

    def suffixes(self) -> Counter[str]:
        """Count the files that are no images by suffix, in this folder and below."""
        return self._details({Reason.NOT_AN_IMAGE})

    def unread(self) -> Counter[str]:
        """Count the files that may be photos that can't be read, in this folder and below."""
        return self._details(_UNREAD)

    def _details(self, reasons: Set[Reason]) -> Counter[str]:
        counts = Counter[str]()
        for folder in self.walk():
            for (reason, detail), number in folder.passed.items():
                if reason in reasons:
                    counts[detail] += number
        return counts

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in this folder and below, not even what was passed over."""
        return not any(folder.photos or folder.passed for folder in self.walk())

    def add_photo(self, path: str) -> None:
        """Add a photo by its path relative to this folder, the data folder."""
        folders, _, name = path.rpartition("/")
        folder = self
        folder.total += 1
        for part in filter(None, folders.split("/")):
            folder = folder.at(part)
            folder.total += 1
        folder.photos.append(name)

    def at(self, path: str) -> PhotoFolder:
        """Return the folder at a path below this one; it is added if it is missing."""
        folder = self
        for name in filter(None, path.split("/")):
            inner = folder.folders.get(name)
            if inner is None:
                inner = PhotoFolder(f"{folder.path}/{name}" if folder.path else name)
                folder.folders[name] = inner
            folder = inner
        return folder


def read_tree(root: Path, passed_over: PassedOver, *, strict: bool = True) -> PhotoFolder:
    """Search a data folder, and return its folders and photos.

    Args:
        root: The data folder.
        passed_over: Counts what is passed over.
        strict: Whether a folder that can't be read is an error; if False, it is left out.

    Raises:
        DataError: `strict`, and a folder can't be read.
    """
    tree = PhotoFolder()
    start = len(os.path.join(root, ""))

    def note(line: str) -> None:
        if strict:
            what = line.partition("; what is in it")[0]
            raise DataError(f"{what}; make the folder readable, or move it elsewhere")

    def on_passed_over(reason: Reason, path: str, detail: str) -> None:
        passed_over(reason, path, detail)
        inner = path[start:]
        if reason is Reason.EMPTY_FOLDER:
            tree.at(inner)
        else:
            tree.at(os.path.dirname(inner)).passed[reason, detail] += 1

    for path in images_below(str(root), note, on_passed_over, order=_files_first):
        tree.add_photo(path[start:])
    return tree


def _files_first(name: str) -> tuple[bool, object]:
    return name.endswith("/"), natural_letters_first(name.rstrip("/"))


def tree_lines(title: str, tree: PhotoFolder, roles: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a drawing of the folders, with the number of photos in each.

    Args:
        title: Name of the data folder.
        tree: The data folder.
        roles: Path of a folder -> what it was read as.
    """
    yield f"{escape(title)}  {_about(tree, roles)}"
    yield from _branches(tree, roles, "", _DEPTH)


def _branches(
    folder: PhotoFolder, roles: Mapping[str, str], indent: str, depth: int
) -> Iterator[str]:
    shown = folder.sorted_folders if depth else []
    more = shown[_MOST:] if len(shown) > _MOST + 1 else []
    shown = shown[: len(shown) - len(more)]
    for number, inner in enumerate(shown, 1):
        last = number == len(shown) and not more
        yield f"{indent}{'└── ' if last else '├── '}{escape(inner.name)}  {_about(inner, roles)}"
        stop = roles.get(inner.path) == CLASS
        deeper = 0 if stop else depth - 1
        yield from _branches(inner, roles, indent + ("    " if last else "│   "), deeper)
    if more:
        photos = sum(inner.total for inner in more)
        yield f"{indent}└── and {len(more)} more folders  {photos:,}"


CLASS: Final = "class"
"""Role of a class folder."""


def _about(folder: PhotoFolder, roles: Mapping[str, str]) -> str:
    role = roles.get(folder.path, "")
    return f"{folder.total:,}{f'  {role}' if role else ''}"


def count_unused(
    tree: PhotoFolder, used: Iterable[str], passed_over: PassedOver, why: str
) -> list[str]:
    """Count the photos of a tree that belong to no class and no part, and return their paths.

    Args:
        tree: The data folder.
        used: Paths of the photos that are used, relative to the data folder.
        passed_over: Counts the others.
        why: The detail that is counted.
    """
    known = set(used)
    unused = [path for path in tree.below() if path not in known]
    for path in unused:
        passed_over(Reason.OUTSIDE_CLASSES, path, why)
    return unused
