"""Where the seconds of a run go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

OTHER = "other"


class Timer:
    """Adds up seconds by what they were spent on; what is not named is "other".

    Of contexts within one another the inner one counts alone, so the parts make up the whole. On a
    GPU, which works on behind the program, a part has the time that was waited for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {OTHER: 0.0}
        self._what, self._since = OTHER, time.perf_counter()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count what happens inside as `what`."""
        before = self._switch(what)
        try:
            yield
        finally:
            self._switch(before)

    def read(self) -> dict[str, float]:
        """Seconds of each part up to now, the largest first."""
        self._switch(self._what)
        return dict(sorted(self.seconds.items(), key=lambda part: -part[1]))

    def _switch(self, what: str) -> str:
        now, before = time.perf_counter(), self._what
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._what, self._since = what, now
        return before
