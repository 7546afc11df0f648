"""Count the files and folders that a search for images passes over, by reason.

Every file and folder that a search meets is either listed as an image, searched, or passed over for
one of the reasons in `Reason`. Training, preview, scoring and export print the counts in one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

from serving.terminal import escape


class Reason(StrEnum):
    """Why a file or a folder is passed over. The values are keys of the summary file."""

    OWN_OUTPUT = "own-output"
    SYSTEM = "system"
    HIDDEN = "hidden"
    OUTSIDE_CLASSES = "outside-classes"
    UNSUPPORTED_FORMAT = "unsupported-format"
    NOT_AN_IMAGE = "not-an-image"
    BACKUP = "backup"
    EMPTY_FILE = "empty-file"
    EMPTY_FOLDER = "empty-folder"
    BROKEN_LINK = "broken-link"
    LINK_LOOP = "link-loop"
    SPECIAL_FILE = "special-file"
    UNREADABLE_FILE = "unreadable-file"


_WORDS: Final[Mapping[Reason, tuple[str, str]]] = {
    Reason.OWN_OUTPUT: ("output of Fledge", "outputs of Fledge"),
    Reason.SYSTEM: ("file or folder of a system or tool", "files and folders of systems and tools"),
    Reason.HIDDEN: ("hidden file or folder", "hidden files and folders"),
    Reason.OUTSIDE_CLASSES: ("photo outside of the classes", "photos outside of the classes"),
    Reason.UNSUPPORTED_FORMAT: ("image of another format", "images of other formats"),
    Reason.NOT_AN_IMAGE: ("file that is no image", "files that are no images"),
    Reason.BACKUP: ("backup or unfinished copy", "backups and unfinished copies"),
    Reason.EMPTY_FILE: ("empty file", "empty files"),
    Reason.EMPTY_FOLDER: ("empty folder", "empty folders"),
    Reason.BROKEN_LINK: ("link to nothing", "links to nothing"),
    Reason.LINK_LOOP: ("link to a folder above it", "links to folders above them"),
    Reason.SPECIAL_FILE: ("pipe or device", "pipes and devices"),
    Reason.UNREADABLE_FILE: ("file that can't be opened", "files that can't be opened"),
}
"""What the line says for one and for several."""

_MAX_DETAILS: Final = 100
"""Largest number of different names, suffixes or formats that are counted for one reason."""
_SHOWN: Final = 4
"""Names, suffixes or formats that the line shows for one reason."""
_OTHERS: Final = "others"

OnPassedOver = Callable[[Reason, str, str], None]
"""Function that is called for each file and folder that is passed over, with the reason, the path,
and a detail: the name, the suffix or the format."""


def not_counted(reason: Reason, path: str, detail: str) -> None:
    """Do nothing, for searches whose caller has no use for the counts."""


class PassedOver:
    """Counts of what was passed over. An instance is an `OnPassedOver`."""

    def __init__(self) -> None:
        self._counts: dict[Reason, Counter[str]] = {}

    def __call__(self, reason: Reason, path: str, detail: str) -> None:
        counts = self._counts.setdefault(reason, Counter())
        full = len(counts) >= _MAX_DETAILS and detail not in counts
        counts[_OTHERS if full else detail] += 1

    def __bool__(self) -> bool:
        return bool(self._counts)

    def totals(self) -> dict[str, int]:
        """Return the number of files and folders for each reason, in the order of `Reason`."""
        return {str(reason): self._counts[reason].total() for reason in self._reasons()}

    def _reasons(self) -> list[Reason]:
        return [reason for reason in Reason if reason in self._counts]

    def line(self) -> str:
        """Return the line that tells the counts; "" if nothing was passed over."""
        parts = []
        for reason in self._reasons():
            counts = self._counts[reason]
            words = _WORDS[reason][counts.total() != 1]
            details = _details(counts)
            parts.append(f"{counts.total()} {words}{f' ({details})' if details else ''}")
        return f"passed over: {', '.join(parts)}" if parts else ""

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the counts as JSON: reason -> detail -> number."""
        return {str(reason): dict(self._counts[reason]) for reason in self._reasons()}

    @classmethod
    def from_json(cls, value: Any) -> PassedOver:
        """Return the counts from the value of `to_json`.

        Raises:
            ValueError: The value has another form.
        """
        passed = cls()
        if not isinstance(value, dict):
            raise ValueError("it has no counts of what was passed over")
        for reason, counts in value.items():
            if not isinstance(counts, dict) or not all(
                type(number) is int and number > 0 for number in counts.values()
            ):
                raise ValueError("its counts of what was passed over are no numbers")
            passed._counts[Reason(reason)] = Counter(counts)
        return passed


def _details(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [(detail, number) for detail, number in ordered if detail]
    if len(named) == 1 and len(counts) == 1:
        return escape(named[0][0])
    shown = [f"{escape(detail)} {number}" for detail, number in named[:_SHOWN]]
    if len(named) > _SHOWN:
        shown.append(f"and {sum(number for _, number in named[_SHOWN:])} more")
    return ", ".join(shown)
