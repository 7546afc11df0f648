"""How the process keeps its memory between one step and the next."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import Final

# glibc's <malloc.h>.
_TRIM_THRESHOLD: Final = -1
_MMAP_MAX: Final = -4
_ALL: Final = 2**31 - 1


def keep_freed() -> None:
    """Have the C library keep large blocks that are freed; call it before the first of them.

    Each step frees the tensors of the one before and takes others of the same sizes. By default
    glibc hands large blocks back to the system and gets them anew as pages that must be zeroed
    one by one, which can cost as much as the network itself. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError, OSError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _ALL)
