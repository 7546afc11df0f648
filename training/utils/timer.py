"""Measure how many wall-clock seconds of a run are spent in each activity."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

OTHER = "other"


class Timer:
    """Timer that adds up wall-clock seconds by activity; all other time counts as "other".

    In nested contexts, time counts only for the innermost activity. The seconds of all activities
    therefore add up to the whole time. A GPU computes asynchronously: the measured time is that of
    the CPU, not that of the GPU.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {OTHER: 0.0}
        self._activity, self._since = OTHER, time.perf_counter()

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Return a context; the time inside it is counted as `activity`."""
        previous = self._switch(activity)
        try:
            yield
        finally:
            self._switch(previous)

    def read(self) -> dict[str, float]:
        """Return the seconds of each activity so far; the longest activity is first."""
        self._switch(self._activity)
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))

    def _switch(self, activity: str) -> str:
        now, previous = time.perf_counter(), self._activity
        self.seconds[previous] = self.seconds.get(previous, 0.0) + now - self._since
        self._activity, self._since = activity, now
        return previous
