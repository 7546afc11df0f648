"""Identity of class names: one rule for folders, tables, split files, scores and bundles.

`normalize_label` removes differences that nobody means: the Unicode form (NFC and NFD look the
same) and spaces at the ends. Names that then still look alike (case, `7` and `007`, invisible
characters) may be two classes, such as the letters `a` and `A`. `similar_labels` finds them.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from typing import Final

_NUMBER: Final = re.compile(r"([+-]?)0*([0-9]+)(?:\.([0-9]*?)0*)?")
_LONGEST_NUMBER: Final = 100
_NEAREST: Final = 3
_MOST_COMPARED: Final = 20_000
"""Largest number of labels among which similar spellings are searched; more take seconds."""


def normalize_label(name: str) -> str:
    """Return a class name in Unicode form NFC, without spaces at the ends."""
    if name.isascii():
        return name.strip()
    return unicodedata.normalize("NFC", name).strip().strip("\ufeff\u200b").strip()


def similarity_key(label: str) -> str:
    """Return a text that is equal for labels that look alike.

    Labels look alike if they differ only in case, in the number of spaces, in compatible characters
    (full width), in invisible characters, or in how the same number is written: 0, 0.0, 00.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = " ".join(text.split())
    number = _NUMBER.fullmatch(text) if text.isascii() and len(text) <= _LONGEST_NUMBER else None
    if number is None:
        return text
    sign = "-" if number[1] == "-" and (number[2].strip("0") or number[3]) else ""
    return f"{sign}{number[2]}{'.' if number[3] else ''}{number[3] or ''}"


def similar_labels(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of two or more distinct labels that look alike, in their order.

    Single letters in both cases, such as `a` and `A`, are classes of their own in sets of
    characters, and form no group.
    """
    groups: dict[str, list[str]] = {}
    for label in dict.fromkeys(labels):
        groups.setdefault(similarity_key(label), []).append(label)
    several = (tuple(group) for group in groups.values() if len(group) > 1)
    return [group for group in several if not _are_letters(group)]


def _are_letters(group: tuple[str, ...]) -> bool:
    return all(len(label) == 1 and label.isalpha() for label in group)


def is_utf8(label: str) -> bool:
    """Check whether a label can be encoded in UTF-8: names of files may have any bytes."""
    return label.isascii() or not any("\ud800" <= character <= "\udfff" for character in label)


def show_label(label: str) -> str:
    """Return a label in quotes, with escapes for all but ASCII characters."""
    return ascii(label)


class LabelMatcher:
    """Matches names from elsewhere, such as folders or a table, with the labels of a model.

    A name matches the equal label, else the label of the same normal form, else the only label that
    looks alike.

    Attributes:
        respelled: The label of each name that was matched with one that only looks alike.
    """

    def __init__(self, labels: Collection[str]) -> None:
        self._exact = frozenset(labels)
        self._normal = _unique((normalize_label(label), label) for label in labels)
        self._similar = _unique((similarity_key(label), label) for label in labels)
        self._found: dict[str, str | None] = {}
        self.respelled: dict[str, str] = {}

    def match(self, name: str) -> str | None:
        """Return the label that `name` stands for; None if there is none."""
        if name in self._exact:
            return name
        if name not in self._found:
            label = self._normal.get(normalize_label(name))
            if label is None:
                label = self._similar.get(similarity_key(name))
                if label is not None:
                    self.respelled[name] = label
            self._found[name] = label
        return self._found[name]


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for key, label in pairs:
        found[key] = label if found.get(key, label) == label else None
    return found


def nearest_labels(name: str, labels: Collection[str]) -> list[str]:
    """Return up to three labels that are spelled like `name`, nearest first; maybe none."""
    if len(labels) > _MOST_COMPARED:
        return []
    by_key = {similarity_key(label): label for label in labels}
    keys = difflib.get_close_matches(similarity_key(name)[:200], by_key, _NEAREST, 0.6)
    return [by_key[key] for key in keys]
