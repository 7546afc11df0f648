"""Wall-clock seconds of a run, by activity."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

OTHER = "other"


class Timer:
    """Adds up wall-clock seconds by activity; time outside any activity counts as "other".

    In nested contexts only the innermost activity is counted, so the seconds of all activities add
    up to the whole time. A GPU computes asynchronously, so an activity gets the time that the CPU
    spent in it, not the GPU's time for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {OTHER: 0.0}
        self._activity, self._since = OTHER, time.perf_counter()

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside the context as `activity`."""
        previous = self._switch(activity)
        try:
            yield
        finally:
            self._switch(previous)

    def read(self) -> dict[str, float]:
        """Seconds of each activity so far, the largest first."""
        self._switch(self._activity)
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))

    def _switch(self, activity: str) -> str:
        now, previous = time.perf_counter(), self._activity
        self.seconds[previous] = self.seconds.get(previous, 0.0) + now - self._since
        self._activity, self._since = activity, now
        return previous
