"""Escape text from others before it is shown on a terminal or in a log.

Names of models, labels and files can contain escape sequences, with which a terminal changes its
title, hides text or moves the cursor.
"""

from __future__ import annotations

import re
import sys
from typing import Final, TextIO

# Control characters, line and paragraph separators, characters that change the direction of the
# text after them, and lone surrogates, which can't be encoded.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: object) -> str:
    r"""Return `str(text)` as one line, with `\x1b` and the like in place of control characters."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def escape_json(text: str) -> str:
    """Escape control characters in a JSON text, which has the same value afterwards."""
    return _CONTROL.sub(lambda found: _json_escape(found[0]), text)


def show(text: object = "", stream: TextIO | None = None, *, flush: bool = False) -> None:
    """Print one line, with control characters escaped.

    Args:
        text: The line.
        stream: Where to print; None: standard output.
        flush: As for `print`.
    """
    print(escape(text), file=stream or sys.stdout, flush=flush)


def show_lines(text: str) -> None:
    """Print several lines, with other control characters escaped."""
    for line in text.split("\n"):
        show(line)


def show_json(text: str) -> None:
    """Print a JSON text that ends with a line break, with control characters escaped."""
    print(escape_json(text), end="")


def _json_escape(character: str) -> str:
    return character if character == "\n" else f"\\u{ord(character):04x}"
