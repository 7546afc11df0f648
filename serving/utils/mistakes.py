"""Collect the mistakes of a file, so that all are told together."""

from __future__ import annotations

from collections import Counter
from typing import Final

from serving.errors import DataError

_MOST: Final = 20
"""Largest number of mistakes that are listed; the others are counted."""


class Mistakes:
    """Mistakes of one file; the first 20 are kept, all are counted."""

    def __init__(self, where: object) -> None:
        """Start without mistakes; `where` names the file."""
        self._where = where
        self._lines: list[str] = []
        self._alike = Counter[str]()
        self._first: dict[str, int] = {}
        self.count = 0

    def add(self, line: str, alike: str = "") -> None:
        """Add a mistake.

        Args:
            line: Such as "line 3: no label"; "" is none.
            alike: What the mistake has in common with others, of which only the first is listed;
                "" lists it in any case.
        """
        if not line:
            return
        self.count += 1
        if alike:
            self._alike[alike] += 1
            if self._alike[alike] > 1:
                return
            self._first[alike] = len(self._lines)
        if len(self._lines) <= _MOST:
            self._lines.append(line)

    def check(self, remedy: str = "") -> None:
        """Check that there was no mistake.

        Args:
            remedy: What helps against all of them; ends the message.

        Raises:
            DataError: There were mistakes. The message has a line for each of the first 20, of
                those that are alike for the first.
        """
        if not self.count:
            return
        lines = list(self._lines)
        for alike, at in self._first.items():
            others = self._alike[alike] - 1
            if others and at < len(lines):
                lines[at] += f" (and {others} more {alike})"
        listed = self.count - sum(number - 1 for number in self._alike.values())
        if listed == 1:
            ending = f"; {remedy}" if remedy else ""
            raise DataError(f"{self._where}, {lines[0]}{ending}")
        more = [f"and {listed - _MOST} more"] if listed > _MOST else []
        last = [remedy] if remedy else []
        head = f"{self._where} has {self.count} mistakes:"
        raise DataError(head, *lines[:_MOST], *more, *last)
