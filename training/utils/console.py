"""Print log lines on stderr, and format text for log lines and error messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from serving.terminal import show

Log = Callable[[str], None]
"""A function that takes one log line."""


def log_to_stderr(line: str) -> None:
    """Print one line on stderr."""
    show(line, sys.stderr, flush=True)


def pluralize(count: int, noun: str) -> str:
    """Return the count and the noun in singular or plural: `1 photo`, `2 photos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_mistakes(
    where: object, mistakes: Sequence[str], *, between: str = ": ", most: int = 10**6
) -> list[str]:
    """Return the lines of an error message that lists mistakes.

    A single mistake gives one line: "WHERE: MISTAKE". Several mistakes give a heading and one line
    for each mistake.

    Args:
        where: What contains the mistakes, such as a path.
        mistakes: Description of each mistake.
        between: Text between `where` and a single mistake.
        most: Largest number of mistakes to list; further mistakes are only counted.
    """
    if len(mistakes) == 1:
        return [f"{where}{between}{mistakes[0]}"]
    more = [f"and {len(mistakes) - most} more"] if len(mistakes) > most else []
    return [f"{where} has {len(mistakes)} mistakes:", *mistakes[:most], *more]


def quoted(name: object, most: int = 80) -> str:
    """Return the `repr` of a name; the middle is cut out if it is longer than `most` characters."""
    text = repr(str(name))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
