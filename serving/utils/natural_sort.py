"""Sort keys for natural order, in which file2 comes before file10.

Scoring uses `natural`, where digits sort before letters. Training uses `natural_letters_first`,
where letters sort before digits; this order decides class indices and data splits. Both keys are
kept, because using one key everywhere would change existing results.
"""

from __future__ import annotations

import re


def natural(name: str) -> tuple[str, str]:
    """Return a sort key that orders numbers by value, and other text by code point.

    Numbers sort before letters. Names that differ only in leading zeros are ordered by code point.
    """
    return re.sub("[0-9]+", _number, name), name


def natural_letters_first(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key like `natural`, but text sorts before numbers: first cola, then 7up."""
    parts = [part for part in re.split("([0-9]+)", name) if part]
    # Not int(): Python refuses numbers of thousands of digits.
    numbers = [part.lstrip("0") if part.isdecimal() else None for part in parts]
    key = [
        (-1, part) if number is None else (len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ]
    return key, name


def _number(match: re.Match[str]) -> str:
    """Return text that replaces a number in a sort key: it sorts by value, before all letters."""
    digits = match[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"
