"""Collect the mistakes of a file, so that all are told together."""

from __future__ import annotations

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
        self.count = 0

    def add(self, line: str) -> None:
        """Add a mistake, such as "line 3: no label"; "" is none."""
        if line:
            self.count += 1
            if len(self._lines) < _MOST:
                self._lines.append(line)

    def check(self, remedy: str = "") -> None:
        """Check that there was no mistake.

        Args:
            remedy: What helps against all of them; ends the message.

        Raises:
            DataError: There were mistakes. The message has a line for each of the first 20.
        """
        if self.count == 1:
            ending = f"; {remedy}" if remedy else ""
            raise DataError(f"{self._where}, {self._lines[0]}{ending}")
        if self.count:
            more = [f"and {self.count - _MOST} more"] if self.count > _MOST else []
            last = [remedy] if remedy else []
            head = f"{self._where} has {self.count} mistakes:"
            raise DataError(head, *self._lines, *more, *last)
