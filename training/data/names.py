"""Names of classes and files: their order, how errors quote them, which are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable

from serving.errors import DataError


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key with numbers by value: 1, 2, 10; the name itself decides between 1 and 01."""
    parts = [t for t in re.split(r"([0-9]+)", name) if t]
    # Not int(): Python refuses numbers of thousands of digits.
    numbers = [t.lstrip("0") if t.isdecimal() else None for t in parts]
    return [
        (-1, t) if n is None else (len(n), n) for t, n in zip(parts, numbers, strict=True)
    ], name


def shown(name: object, most: int = 80) -> str:
    """A name as an error quotes it: on one line, the middle of a long one left out."""
    text = repr(str(name))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def check_names(labels: Iterable[str]) -> None:
    """Refuse names of classes that are no UTF-8.

    Raises:
        DataError: Names the first.
    """
    for name in labels:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"class {shown(name)} is no UTF-8 name; rename it") from None
