"""Find the images in folders, or those that match a glob pattern.

This is the only search of folders: training, preview, scoring and export list the same images.
Symbolic links are followed, and loops of links are detected. `file_kinds` has the rules which files
are images and what is passed over. A folder that matches a pattern stands for all images in that
folder and below: `photos/2024-*` lists all images of those folders.

A pattern is matched one path component at a time during a single walk of the folders. Each image is
therefore listed only once, even if several components of the pattern (such as `**`) match it.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from serving.inputs import file_kinds
from serving.inputs.file_kinds import Kind
from serving.inputs.passed_over import OnPassedOver, Reason, not_counted
from serving.utils.natural_sort import natural

Note = Callable[[str], None]
"""Function that is called with a message about each input that can't be read."""

Order = Callable[[str], Any]
"""Sort key of the names in a folder. Names of folders end in "/"."""

_WILDCARD: Final = re.compile(r"[*?[]")
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")


def expand_braces(word: str) -> Iterator[str]:
    """Expand braces as a shell does: `{a,b}.jpg` yields `a.jpg` and `b.jpg`.

    Ranges such as `data-{000..012}.tar` are expanded, too.
    """
    for match in _BRACES.finditer(word):
        items = _items(match[1])
        if items is not None:
            head, tail = word[: match.start()], word[match.end() :]
            yield from (f"{head}{item}{rest}" for item in items for rest in expand_braces(tail))
            return
    yield word


def _items(text: str) -> Iterator[str] | None:
    found = _RANGE.fullmatch(text)
    if found is None:
        return iter(text.split(",")) if "," in text else None
    first, last = found[1], found[2]
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    return (f"{number:0{width}}" for number in range(int(first), int(last) + step, step))


def is_pattern(word: str) -> bool:
    """Check whether `word` contains a wildcard: `*`, `?` or `[`."""
    return bool(_WILDCARD.search(word))


def natural_order(name: str) -> tuple[str, str]:
    """Sort files and folders together, `2.jpg` before `10.jpg`."""
    return natural(name.rstrip("/"))


def images_below(
    folder: str,
    note: Note,
    passed_over: OnPassedOver = not_counted,
    order: Order = natural_order,
) -> Iterator[str]:
    """Yield the paths of all images in a folder and below.

    Symbolic links are followed. Memory holds only the names of the current folder and its parents.

    Args:
        folder: Path of the folder.
        note: Called with a message for each folder that can't be read.
        passed_over: Called for each file and folder that is passed over.
        order: Order of the names in each folder.
    """
    walk = _Walk((None,), folders_only=True, any_suffix=False, order=order)
    return walk.run(folder, note, passed_over)


def images_matching(
    pattern: str, note: Note, passed_over: OnPassedOver = not_counted
) -> Iterator[str]:
    """Yield the paths of the files that match a glob pattern; `**` matches any number of folders.

    A wildcard does not match the leading dot of a hidden name, nor the folders of systems and
    tools, which must be named. A pattern with a literal suffix, such as `*.bin`, matches all files
    with that suffix. Any other pattern matches only images.
    Leading path components that exist under exactly that name are taken literally, even if they
    contain wildcards: `photos [1]/*.jpg` lists the folder `photos [1]`.

    Args:
        pattern: The glob pattern.
        note: Called with a message for each folder that can't be read.
        passed_over: Called for each file and folder that matches and is passed over.
    """
    start = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    while parts and not (is_pattern(parts[0]) and not _exists(start, parts[0])):
        start = os.path.join(start, parts.pop(0))
    folders_only = pattern.endswith("/")
    while parts and parts[-1] == "**":
        folders_only = parts.pop() == "**"
    suffix = os.path.splitext(parts[-1])[1] if parts else ""
    any_suffix = len(suffix) > 1 and not is_pattern(suffix)
    walk = _Walk(
        (*map(_part, parts), None),
        folders_only=folders_only,
        any_suffix=any_suffix,
        named=frozenset(part for part in parts if not is_pattern(part)),
    )
    return walk.run(start, note, passed_over)


def _exists(start: str, name: str) -> bool:
    return os.path.lexists(os.path.join(start, name))


def _part(text: str) -> re.Pattern[str] | None:
    if text == "**":
        return None
    no_dot = "" if text.startswith(".") else r"(?!\.)"
    return re.compile(no_dot + fnmatch.translate(text))


States = frozenset[int]
"""Indices of the pattern components that the next name may match: states of an NFA."""


@dataclass(frozen=True)
class _Level:
    """State of the walk in one folder on the current path.

    Attributes:
        folder: Path of the folder.
        identity: Device and inode of the folder.
        states: Indices in `_Walk.parts` of the pattern components that a name in this folder may
            match.
        names: Names in the folder that are still to be visited. Names of folders end in "/".
    """

    folder: str
    identity: tuple[int, int]
    states: States
    names: Iterator[str]


@dataclass(frozen=True)
class _Walk:
    """Depth-first walk of the folders and files that match a pattern.

    Attributes:
        parts: Regular expression for each path component of the pattern; None for `**`. The last
            item is always None, because everything below a matching folder is visited.
        folders_only: Whether the pattern can only match folders, as `photos/*/` does.
        any_suffix: Whether files of any suffix can match the pattern; if False, only images can.
        named: Components of the pattern without wildcards. They match folders of systems, too.
        order: Order of the names in each folder.
    """

    parts: tuple[re.Pattern[str] | None, ...]
    folders_only: bool
    any_suffix: bool
    named: frozenset[str] = frozenset()
    order: Order = natural_order

    def run(self, start: str, note: Note, passed_over: OnPassedOver) -> Iterator[str]:
        """Yield the paths of the matching files below the folder `start`.

        An explicit stack replaces recursion, because folders may be nested deeper than Python's
        recursion limit.
        """
        levels: list[_Level] = []
        self._enter(levels, start, frozenset({0}), note, passed_over)
        while levels:
            name = next(levels[-1].names, None)
            if name is None:
                levels.pop()
                continue
            path = os.path.join(levels[-1].folder, name)
            if path.endswith("/"):
                states = self._step(levels[-1].states, name[:-1])
                self._enter(levels, path[:-1], states, note, passed_over)
            else:
                yield path

    def _enter(
        self,
        levels: list[_Level],
        folder: str,
        states: States,
        note: Note,
        passed_over: OnPassedOver,
    ) -> None:
        states = self._skip(states)
        name = os.path.basename(folder)
        try:
            status = os.stat(folder or ".")
            identity = (status.st_dev, status.st_ino)
            if any(identity == level.identity for level in levels):
                passed_over(Reason.LINK_LOOP, folder, name)
                return
            kind = file_kinds.folder_kind(folder) if levels and name not in self.named else None
            if kind is not None:
                passed_over(kind.reason, folder, kind.detail)
                return
            is_empty, names = True, list[str]()
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    is_empty = False
                    if found := self._name(entry, states, passed_over):
                        names.append(found)
        except OSError as error:
            note(f"{folder or '.'}: {error.strerror or error}; what is in it is left out")
            return
        if is_empty and levels and len(self.parts) - 1 in states:
            passed_over(Reason.EMPTY_FOLDER, folder, name)
        names.sort(key=self.order)
        levels.append(_Level(folder, identity, states, iter(names)))

    def _skip(self, states: States) -> States:
        """Return `states` with the index after each `**` added, as `**` may match no folder."""
        last, skipped = len(self.parts) - 1, set(states)
        for at in range(last):
            if at in skipped and self.parts[at] is None:
                skipped.add(at + 1)
        return frozenset(skipped)

    def _step(self, states: States, name: str) -> States:
        after = set()
        for at in states:
            part = self.parts[at]
            if part is None and not name.startswith("."):
                after.add(at)
            elif part is not None and part.fullmatch(name):
                after.add(at + 1)
        return frozenset(after)

    def _name(self, entry: os.DirEntry[str], states: States, passed_over: OnPassedOver) -> str:
        """Return the name of a folder entry that is to be visited, or "" if there is no match.

        The name of a folder gets a "/" at the end.
        """
        after, last = self._step(states, entry.name), len(self.parts) - 1
        if not after and last not in states:
            return ""  # not asked for
        is_folder = _is_folder(entry)
        if after and not is_folder and last not in after:
            return ""
        kind = self._kind(entry, after, is_folder=is_folder)
        if kind is not None:
            passed_over(kind.reason, entry.path, kind.detail)
            return ""
        if is_folder:
            return entry.name + "/"
        matched_itself = last not in states
        if matched_itself and self.folders_only:
            return ""
        by_suffix = matched_itself and self.any_suffix
        kind = (file_kinds.own_picture_kind if by_suffix else file_kinds.file_kind)(entry)
        if kind is not None:
            passed_over(kind.reason, entry.path, kind.detail)
            return ""
        return entry.name

    def _kind(self, entry: os.DirEntry[str], after: States, *, is_folder: bool) -> Kind | None:
        """Return why an entry is passed over because of its name.

        Args:
            entry: The entry.
            after: The states after its name. Empty for a hidden name that the pattern leaves out.
            is_folder: Whether it is a folder, or a link to one.
        """
        if entry.name in self.named:
            return None
        if after:
            return file_kinds.system_kind(entry.name, is_folder=is_folder)
        return file_kinds.named_kind(entry.name, is_folder=is_folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself, which is listed as an input that can't be read
