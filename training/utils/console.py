"""What a person is told while work goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

MOST: Final = 5
"""Wrong lines of a table that are told at once."""

Log = Callable[[str], None]
"""Takes lines for a person."""


def log_to_stderr(line: str) -> None:
    """One line for a person, on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def counted(number: int, what: str) -> str:
    """`1 photo`, `2 photos`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def listed(where: object, wrong: Sequence[str], *, between: str = ": ", most: int = 10**6) -> str:
    """A mistake behind the place where it is; several in a line each, `most` of them."""
    if len(wrong) == 1:
        return f"{where}{between}{wrong[0]}"
    more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
    return "\n  ".join([f"{where} has {len(wrong)} mistakes:", *wrong[:most], *more])


def shown(name: object, most: int = 80) -> str:
    """A name as an error quotes it: on one line, the middle of a long one left out."""
    text = repr(str(name))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
