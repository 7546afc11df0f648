"""What a person is told while work goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]
"""Takes lines for a person."""


def say(line: str) -> None:
    """One line for a person, on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)
