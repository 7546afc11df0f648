"""Folders and patterns -> the images there, in natural order, through links and out of loops.

A pattern is a search that goes only where it can still match, so nothing is found twice. What lies
in a folder that matches belongs to it: `photos/2024-*` is all images of those folders.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from serving.imaging import decode
from serving.utils.natural_sort import natural

Note = Callable[[str], None]
"""Takes a line about what is no input and could not be looked into."""

_MAGIC: Final = re.compile(r"[*?[]")
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")


def braces(word: str) -> Iterator[str]:
    """Write `data-{000..012}.tar` and `{a,b}.jpg` out, as shells and WebDataset do."""
    for match in _BRACES.finditer(word):
        items = _items(match[1])
        if items is not None:
            head, tail = word[: match.start()], word[match.end() :]
            yield from (f"{head}{item}{rest}" for item in items for rest in braces(tail))
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
    """Whether it has `*`, `?` or `[`."""
    return bool(_MAGIC.search(word))


def below(folder: str, note: Note) -> Iterator[str]:
    """Images in a folder and below, told by `images.SUFFIXES`; hidden ones are left out.

    In each folder the order is natural: `2.jpg` before `10.jpg`. Links are followed. The names of
    one folder are held, and no others.
    """
    return _Search((None,), inside=True, every=False).run(folder, note)


def matching(pattern: str, note: Note) -> Iterator[str]:
    """What a pattern matches; `**` is any number of folders.

    Hidden names match only where the pattern shows the dot. A pattern with a suffix of its own, as
    `*.bin`, names all that it matches, any other one images. Leading parts that are there by their
    very name are no patterns: `photos [1]/*.jpg`.
    """
    start = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    while parts and not (is_pattern(parts[0]) and not _there(start, parts[0])):
        start = os.path.join(start, parts.pop(0))
    inside = pattern.endswith("/")
    while parts and parts[-1] == "**":
        inside = parts.pop() == "**"
    suffix = os.path.splitext(parts[-1])[1] if parts else ""
    every = len(suffix) > 1 and not is_pattern(suffix)
    return _Search((*map(_part, parts), None), inside=inside, every=every).run(start, note)


def _there(start: str, name: str) -> bool:
    return os.path.lexists(os.path.join(start, name))


def _part(text: str) -> re.Pattern[str] | None:
    if text == "**":
        return None
    hidden = "" if text.startswith(".") else r"(?!\.)"
    return re.compile(hidden + fnmatch.translate(text))


States = frozenset[int]
"""How many parts of a pattern are matched on the way to a folder: all that is possible."""


@dataclass(frozen=True)
class _Level:
    """A folder on the way; folders among its names end in "/"."""

    folder: str
    identity: tuple[int, int]
    states: States
    names: Iterator[str]


@dataclass(frozen=True)
class _Search:
    """A walk along a pattern.

    parts: of the pattern, None for `**`; the last is None and stands for all that lies in what
        matched.
    inside: only folders match. every: files match whatever their suffix.
    """

    parts: tuple[re.Pattern[str] | None, ...]
    inside: bool
    every: bool

    def run(self, start: str, note: Note) -> Iterator[str]:
        """Files, depth first. A stack of its own: folders may be deeper than Python's."""
        levels: list[_Level] = []
        self._enter(levels, start, frozenset({0}), note)
        while levels:
            name = next(levels[-1].names, None)
            if name is None:
                levels.pop()
                continue
            path = os.path.join(levels[-1].folder, name)
            if path.endswith("/"):
                states = self._step(levels[-1].states, name[:-1])
                self._enter(levels, path[:-1], states, note)
            else:
                yield path

    def _enter(self, levels: list[_Level], folder: str, states: States, note: Note) -> None:
        states = self._skip(states)
        try:
            status = os.stat(folder or ".")
            identity = (status.st_dev, status.st_ino)
            if any(identity == level.identity for level in levels):
                return  # a loop
            with os.scandir(folder or ".") as entries:
                kept = (self._kept(entry, states) for entry in entries)
                names = sorted(filter(None, kept), key=lambda name: natural(name.rstrip("/")))
        except OSError as error:
            note(f"{folder or '.'}: {error.strerror or error}; what is in it is left out")
            return
        levels.append(_Level(folder, identity, states, iter(names)))

    def _skip(self, states: States) -> States:
        """`**` may stand for no folder at all."""
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

    def _kept(self, entry: os.DirEntry[str], states: States) -> str:
        """The entry's name, or "" where the search has no use for it."""
        after, last = self._step(states, entry.name), len(self.parts) - 1
        if after and _is_folder(entry):
            return entry.name + "/"
        if last not in after:
            return ""
        direct = last not in states
        if direct and (self.inside or self.every):
            return entry.name if self.every and not self.inside else ""
        return entry.name if is_image(entry.name) else ""


def is_image(name: str) -> bool:
    """Whether a name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in decode.SUFFIXES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself: an input that can't be read
