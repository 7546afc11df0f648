"""Natural sort order: file2 before file10."""

from __future__ import annotations

import re


def natural(name: str) -> tuple[str, str]:
    """Sorting key: numbers by value, all else by code point, equal values by spelling."""
    return re.sub("[0-9]+", _number, name), name


def _number(match: re.Match[str]) -> str:
    """Digits such that strings are in the order of the values; before every letter."""
    digits = match[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"
