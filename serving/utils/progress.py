"""Progress display: a progress bar on a terminal, or else a line of text every few seconds."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final, TextIO

from serving.terminal import show

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

EVERY: Final = 10.0
"""Seconds between two lines of text."""


class Progress(AbstractContextManager["Progress"]):
    """Counter of the images and errors of a scoring job, shown on a stream.

    Attributes:
        now: Number of images that this run has processed, without those of earlier runs.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        """Start the clock.

        Args:
            total: Number of images of the job.
            done: Number of these images that earlier runs have processed.
            stream: Stream on which the progress is shown; None: standard error.
        """
        self._total, self._stream = total, stream or sys.stderr
        self._before, self.now, self._errors = done, 0, 0
        self._start = self._last_line = time.monotonic()
        self._bar: Bar | None = progress_bar(self._stream) if self._stream.isatty() else None
        if self._bar:
            self._bar.add_task("scoring", total=total)

    @property
    def seconds(self) -> float:
        """Seconds since this object was created."""
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        """Show the progress bar, if the stream is a terminal."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the progress bar and restore the cursor."""
        if self._bar:
            self._bar.stop()

    def step(self, failed: bool) -> None:
        """Count one processed image and update the display.

        Args:
            failed: Whether the image could not be scored.
        """
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
            show(
                f"{done} of {self._total} images, {self._errors} errors, "
                f"{rate:.0f} images/s, {left:.0f} s left",
                self._stream,
                flush=True,
            )


def progress_bar(stream: TextIO | None = None) -> Bar:
    """Create a progress display of `rich` that disappears at the end.

    The display is disabled if the stream is not a terminal, and in processes of torchrun other than
    rank 0.

    Args:
        stream: Stream on which the progress is shown; None: standard error.
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
