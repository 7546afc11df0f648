"""Start Ray on a machine that is too busy for Ray's own time limits."""

from collections.abc import Callable
from typing import TypeVar

Started = TypeVar("Started")

LATE = "timed out during startup"
"""Part of Ray's error when its process needs more than 30 s to start. No option changes them."""
ATTEMPTS = 5


def patient(start: Callable[[], Started]) -> Started:
    """Call `start`; call it again while Ray was too late."""
    for _ in range(ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:
            if LATE not in str(error):
                raise
    return start()
