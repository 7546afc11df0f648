"""Progress display: a bar on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import os
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
    """Counts images and errors of a scoring job and shows them on `stream`.

    Attributes:
        now: Images processed by this run.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        """Start the clock.

        Args:
            total: Images of the job.
            done: Of these, images that earlier runs processed.
            stream: Where the progress is shown; default: standard error.
        """
        self._total, self._stream = total, stream or sys.stderr
        self._before, self.now, self._errors = done, 0, 0
        self._start = self._last_line = time.monotonic()
        self._bar: Bar | None = progress_bar(self._stream) if self._stream.isatty() else None
        if self._bar:
            self._bar.add_task("scoring", total=total)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
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
        """Remove the bar and restore the cursor."""
        if self._bar:
            self._bar.stop()

    def step(self, failed: bool) -> None:
        """Count one image."""
        self.now += 1
        self._errors += failed
        done = self._before + self.now
        rate = self.now / max(self.seconds, 1e-9)
        if self._bar:
            description = f"{rate:.0f} images/s, {self._errors} errors"
            self._bar.update(self._bar.task_ids[0], completed=done, description=description)
        elif time.monotonic() - self._last_line >= EVERY:
            self._last_line = time.monotonic()
            left = (self._total - done) / rate
            print(
                f"{done} of {self._total} images, {self._errors} errors, "
                f"{rate:.0f} images/s, {left:.0f} s left",
                file=self._stream,
                flush=True,
            )


def progress_bar(stream: TextIO | None = None) -> Bar:
    """Progress bars that disappear when they end.

    Disabled where `stream` (default: standard error) is no terminal, and on all processes of
    torchrun except rank 0.
    """
    from rich import progress  # imported here, because it takes time and few commands need it
    from rich.console import Console

    console = Console(file=stream or sys.stderr)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or os.environ.get("RANK", "0") != "0",
    )
