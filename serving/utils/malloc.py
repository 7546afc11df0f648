"""Memory that was freed goes back to the system, so a service that runs for months stays small."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

LARGE: Final = 4 * 2**20
"""Bytes from which a block is mapped by itself. Smaller ones, as most photos decode into, are kept:
to map them anew for each image would cost more than it is worth."""

_M_MMAP_THRESHOLD: Final = -3


def give_back() -> None:
    """Keep glibc's threshold where it is; on other systems nothing is to be done.

    By itself it rises with the largest block that was ever freed, up to 32 MiB: after a few large
    images all later ones come from heaps, which grow and hardly shrink.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _call("mallopt", _M_MMAP_THRESHOLD, LARGE)


def trim() -> None:
    """Give back what is free between blocks in use, as after a model that is served no more."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), function, None)  # musl has neither
        if found:
            found(*arguments)
