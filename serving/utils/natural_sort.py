"""Natural sort order: file2 before file10."""

from __future__ import annotations

import re


def natural(name: str) -> tuple[str, str]:
    """Sort key: numbers by value, all else by code point; equal values by spelling."""
    return re.sub("[0-9]+", _number, name), name


def _number(match: re.Match[str]) -> str:
    """A string that sorts by the number's value, and before every letter."""
    digits = match[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"
