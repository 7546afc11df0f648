"""How far a long run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

EVERY: Final = 10.0
"""Seconds between plain lines."""


class Progress(AbstractContextManager["Progress"]):
    """Counts images and errors, and shows them on `stream`.

    total: images that will come; stream: standard error unless told otherwise.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        """Start the clock."""
        self._total, self._stream = total, stream or sys.stderr
        self._done = self._errors = 0
        self._start = self._said = time.monotonic()
        self._bar: Bar | None = _bar(self._stream) if self._stream.isatty() else None
        if self._bar:
            self._bar.add_task("", total=total, errors=0, rate=0.0)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        """Show the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def step(self, failed: bool) -> None:
        """One more image is done."""
        self._done += 1
        self._errors += failed
        rate = self._done / max(self.seconds, 1e-9)
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], completed=self._done, errors=self._errors, rate=rate
            )
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            left = (self._total - self._done) / rate
            print(
                f"{self._done} of {self._total} images, {self._errors} errors, "
                f"{rate:.0f} images/s, {left:.0f} s left",
                file=self._stream,
                flush=True,
            )


def _bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} images/s, {task.fields[errors]} errors"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
