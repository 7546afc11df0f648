"""Faults that are known and belong to later work. This is the only place where they are excused.

The fuzzer leaves out inputs that show one of them: they would be found again and again, each time
for seconds. `--replay` still shows the fault. `test_known.py` fails as soon as an example does no
longer show its fault: then remove the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A known fault.

    Attributes:
        targets: Names of the targets that can show it.
        reason: What happens, and where.
        shows: Whether an input shows it.
        example: Builds an input for the first target.
    """

    targets: tuple[str, ...]
    reason: str
    shows: Callable[[bytes], bool]
    example: Callable[[], bytes]


def skipped(target: str, data: bytes) -> bool:
    """Return whether an input is left out, because it shows a known fault."""
    return any(target in known.targets and known.shows(data) for known in KNOWN)


KNOWN: tuple[Known, ...] = ()
