"""Natural sort order: file2 before file10.

Two keys, because both orders are part of existing results: scoring puts digits before letters, and
training puts letters first, which decides the class indices and the splits of a data set.
"""

from __future__ import annotations

import re


def natural(name: str) -> tuple[str, str]:
    """Sort key: numbers by value, all else by code point; equal values by spelling."""
    return re.sub("[0-9]+", _number, name), name


def natural_letters_first(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key like `natural`, but text before numbers: cola, 7up."""
    parts = [part for part in re.split("([0-9]+)", name) if part]
    # Not int(): Python refuses numbers of thousands of digits.
    numbers = [part.lstrip("0") if part.isdecimal() else None for part in parts]
    key = [
        (-1, part) if number is None else (len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ]
    return key, name


def _number(match: re.Match[str]) -> str:
    """A string that sorts by the number's value, and before every letter."""
    digits = match[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"
