"""Unique names of folders and files, such that no two are the same on any disk.

Disks differ: some take upper and lower case for the same letter, some reserve names such as CON,
most take 255 bytes. Two names are therefore the same if they differ only in case or in the form of
accented letters.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_LONGEST: Final = 255  # bytes of a name, where the disk does not say
_RESERVED: Final = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.I)


class UniqueNames:
    """Names within one folder; each is given once."""

    def __init__(self, longest: int, taken: Iterable[str] = ()) -> None:
        """Set the limit.

        Args:
            longest: Bytes of the longest name.
            taken: Names that are not given.
        """
        self._longest = longest
        self._counts = {_key(name): 1 for name in taken}

    def add(self, stem: str, suffix: str = "") -> str:
        """Return `stem` + `suffix`, shortened, and with a number in between if it is taken."""
        name = self._shortened(stem, suffix)
        first = _key(name)
        while _key(name) in self._counts:
            self._counts[first] = self._counts.get(first, 1) + 1
            name = self._shortened(stem, f"-{self._counts[first]}{suffix}")
        self._counts[_key(name)] = 1
        return name

    def _shortened(self, stem: str, suffix: str) -> str:
        if len(os.fsencode(suffix)) > self._longest // 2:
            stem, suffix = stem + suffix, ""
        stem = stem[: self._longest]
        while len(os.fsencode(stem + suffix)) > self._longest:
            stem = stem[:-1]
        return stem + suffix


def folder_names(labels: Iterable[str], names: UniqueNames) -> dict[str, str]:
    """Return the name of the folder for each label.

    A label keeps its name if every disk takes it and no other label has the same. Characters that
    some disks don't take become `_`; then a number makes the name unique. The names depend only on
    the labels and their order.

    Args:
        labels: The labels.
        names: The names that are taken, and the limit.
    """
    found = sorted(dict.fromkeys(labels), key=lambda label: _safe(label) != label)
    return {label: names.add(_safe(label)) for label in found}


def longest_name(folder: Path) -> int:
    """Return how many bytes the disk of a folder, which may not exist yet, takes for a name."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        return min(_LONGEST, os.pathconf(existing, "PC_NAME_MAX"))
    except (OSError, ValueError):
        return _LONGEST


def _safe(label: str) -> str:
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f\x7f]', "_", label).strip(". ") or "_"
    return f"_{name}" if _RESERVED.fullmatch(name) else name


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
