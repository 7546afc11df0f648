"""Memory that this process may use, and budgets of it that threads share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from serving.utils.cpu import control_groups

_POLL_SECONDS: Final = 0.05
_UNLIMITED: Final = 2**60  # version 1 of control groups writes a number near 2**63 for no limit


def container_memory() -> int:
    """Return the bytes that this process and its children may use.

    This is the least of the machine's memory and the limits of its control groups.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *filter(None, map(_limit, control_groups("memory")))])


def _limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = int((folder / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return limit if 0 < limit < _UNLIMITED else None
    return None


def free_memory() -> int:
    """Return the bytes that are free on the machine or in its tightest control group."""
    free = [int(psutil.virtual_memory().available)]
    free += [left for left in map(_free, control_groups("memory")) if left is not None]
    return max(0, min(free))


def _free(folder: Path) -> int | None:
    v2 = (folder / "memory.max").exists()
    limit, used = (
        ("memory.max", "memory.current")
        if v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        # The kernel drops these pages of files when memory is needed.
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name == ("inactive_file" if v2 else "total_inactive_file"):
                left += int(size)
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return left


def resident_bytes() -> int:
    """Return the physical memory that this process has now; 0 if the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class MemoryBudget:
    """Bytes that several threads share. A thread that needs more than is free waits.

    Attributes:
        total: All bytes of the budget.
        used: Bytes that are reserved now.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size: int, cancelled: Callable[[], bool] = bool) -> Iterator[None]:
        """Reserve bytes during the `with` block; wait until they are free.

        Args:
            size: Number of bytes; at most `total` are reserved.
            cancelled: Function that returns True once the bytes are no longer needed.

        Raises:
            Cancelled: `cancelled` returned True.
        """
        size = min(size, self.total)
        with self._changed:
            while self.used + size > self.total:
                if cancelled():
                    raise Cancelled
                self._changed.wait(_POLL_SECONDS)
            self.used += size
        try:
            yield
        finally:
            with self._changed:
                self.used -= size
                self._changed.notify_all()


class Cancelled(Exception):
    """The caller no longer needs the result."""
