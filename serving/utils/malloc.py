"""Settings of glibc's memory allocator: return freed memory to the system, or keep it for reuse.

`return_large_blocks` is for the HTTP service, whose memory use must stay small for months.
`retain_freed_blocks` is for training, which allocates blocks of the same sizes in every step. The
functions do nothing on other operating systems and with other C libraries.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

LARGE: Final = 4 * 2**20
"""Size, in bytes, of the smallest block that gets a memory mapping of its own. Smaller blocks, such
as most decoded photos, stay on the heap, where an allocation takes less time."""

# Parameters of mallopt, from glibc's <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
_INT_MAX: Final = 2**31 - 1


def return_large_blocks() -> None:
    """Make glibc return freed blocks of `LARGE` bytes or more to the system.

    Fixes the mmap threshold, the size from which a block gets its own memory mapping. By default
    glibc raises the threshold to the size of the largest freed block, up to 32 MiB. After a few
    large images, all later images would be on the heap, which rarely shrinks.

    If the environment variable MALLOC_MMAP_THRESHOLD_ is set, this function does nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _call("mallopt", _M_MMAP_THRESHOLD, LARGE)


def retain_freed_blocks() -> None:
    """Make glibc keep freed large blocks for reuse. Call this before the first large allocation.

    Each training step frees tensors and allocates new tensors of the same sizes. By default glibc
    returns large freed blocks to the system and then gets new pages. The kernel must fill the new
    pages with zeros, which can take as much time as the network itself.
    """
    _call("mallopt", _M_MMAP_MAX, 0)
    _call("mallopt", _M_TRIM_THRESHOLD, _INT_MAX)


def trim() -> None:
    """Return free heap memory to the system, for example after unloading a model."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), function, None)  # musl has neither function
        if found:
            found(*arguments)
