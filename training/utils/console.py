"""Log lines on stderr, and helpers that word log lines and error messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

MAX_MISTAKES: Final = 5
"""Largest number of a table's mistakes that an error message lists."""

Log = Callable[[str], None]
"""A function that takes one log line."""


def log_to_stderr(line: str) -> None:
    """Print one line on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def pluralize(count: int, noun: str) -> str:
    """The count with the noun in singular or plural: `1 photo`, `2 photos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_mistakes(
    where: object, mistakes: Sequence[str], *, between: str = ": ", most: int = 10**6
) -> str:
    """The message "WHERE: MISTAKE" for one mistake, or a line for each of the first `most`."""
    if len(mistakes) == 1:
        return f"{where}{between}{mistakes[0]}"
    more = [f"and {len(mistakes) - most} more"] if len(mistakes) > most else []
    return "\n  ".join([f"{where} has {len(mistakes)} mistakes:", *mistakes[:most], *more])


def quoted(name: object, most: int = 80) -> str:
    """The `repr` of a name, shortened in the middle to about `most` characters."""
    text = repr(str(name))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
