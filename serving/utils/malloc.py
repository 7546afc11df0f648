"""glibc allocator settings: return freed memory to the system, or retain it for reuse.

`return_large_blocks` suits a service, whose memory must stay small for months.
`retain_freed_blocks` suits training, which allocates the same sizes again in every step.
On other systems and other C libraries all functions do nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

LARGE: Final = 4 * 2**20
"""Size in bytes from which a block gets its own memory mapping. Smaller blocks, such as most
decoded photos, stay on the heap, because a mapping for each image would cost more than it saves."""

# Parameters of mallopt, from glibc's <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
_INT_MAX: Final = 2**31 - 1


def return_large_blocks() -> None:
    """Fix glibc's mmap threshold at `LARGE`, so that freed large blocks go back to the system.

    By default the threshold rises to the size of the largest freed block, up to 32 MiB. After a few
    large images, all later images would therefore be on the heap, which rarely shrinks.
    The environment variable MALLOC_MMAP_THRESHOLD_ takes precedence.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _call("mallopt", _M_MMAP_THRESHOLD, LARGE)


def retain_freed_blocks() -> None:
    """Make glibc retain freed large blocks for reuse; call it before the first allocation of one.

    Each training step frees tensors and allocates others of the same sizes. By default glibc
    returns large blocks to the system and gets new pages, which the kernel zeroes one by one;
    that can cost as much time as the network itself.
    """
    _call("mallopt", _M_MMAP_MAX, 0)
    _call("mallopt", _M_TRIM_THRESHOLD, _INT_MAX)


def trim() -> None:
    """Return free heap pages to the system, for example after a model was unloaded."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), function, None)  # musl has neither function
        if found:
            found(*arguments)
