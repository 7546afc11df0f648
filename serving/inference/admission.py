"""Admission of images to an engine: how many are in progress, and how many are overdue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from serving.errors import Overloaded

EXTRA_THREADS: Final = 1
"""Number of threads of `scheduling.PerImageEngine` in addition to one per core. While a thread
waits for the GIL or for the next image, an additional thread uses the core. On 2 cores a third
thread gains about 5 %, a fourth thread nothing."""

Observe = Callable[[str, float], None]
"""Callback for measurements: (name, value). The names "queue", "decode" and "infer" have a value in
seconds. "rows" is the batch size of a run of the graph. "waiting" is the number of images that are
queued or in progress."""


CLOSE_SECONDS: Final = 10.0
"""Longest wait for the threads of an engine that is closed."""


class QueueLimit:
    """Counter of the images that are queued or in progress, with an upper limit.

    `admit` may be called only in the thread of the event loop, because there is no lock.

    Attributes:
        limit: Largest number of images.
        count: Number of images now.
    """

    def __init__(self, limit: int, observe: Observe) -> None:
        self.limit = limit
        self.count = 0
        self._observe = observe

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count one more image during the `with` block.

        Raises:
            Overloaded: The limit is reached.
        """
        if self.count >= self.limit:
            raise Overloaded(f"{self.limit} images are waiting already; ask again in a second")
        self.count += 1
        self._observe("waiting", self.count)
        try:
            yield
        finally:
            self.count -= 1
            self._observe("waiting", self.count)


class Work(Protocol):
    """What `OverdueCount` needs to know of an image.

    Attributes:
        started: Whether a thread works on the image.
        overdue: Whether the image is counted.
    """

    started: bool
    overdue: bool


class OverdueCount:
    """Count of the threads that work on an image whose request has ended, such as by its deadline.

    Its methods may be called only in the thread of the event loop, because there is no lock.

    Attributes:
        count: Number of such threads now.
    """

    def __init__(self, threads: int, observe: Observe) -> None:
        self.count = 0
        self._threads, self._observe = threads, observe

    @property
    def all(self) -> bool:
        """Whether all threads are overdue, so that no image can be predicted."""
        return self.count >= self._threads

    def add(self, work: Work) -> None:
        """Count an image whose request has ended, if a thread works on it."""
        if work.started and not work.overdue:
            work.overdue = True
            self._change(1)

    def remove(self, work: Work) -> None:
        """Remove an image, which its thread has finished, from the count."""
        if work.overdue:
            work.overdue = False
            self._change(-1)

    def _change(self, by: int) -> None:
        self.count += by
        self._observe("overdue", self.count)
