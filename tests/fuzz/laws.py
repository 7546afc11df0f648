"""The laws that every input must keep, and the faults that break them."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from serving.errors import FledgeError
from tests.fuzz.guard import ROOT, Guard
from tests.fuzz.target import Target

MAX_SECONDS = 1.0
"""CPU time of the process for one input."""
MAX_GROWTH = 300 * 10**6
"""Bytes by which one input may raise the resident memory, at its peak."""
GIVE_UP_SECONDS = 8.0
"""CPU time after which an endless loop in Python is broken off."""

SLOW, MEMORY, ACCESS, CRASH, HANG = "slow", "memory", "access", "crash", "hang"
PACKAGES = tuple(str(ROOT / package) + os.sep for package in ("serving", "training", "export"))
_FUZZ = str(ROOT / "tests") + os.sep


@dataclass(frozen=True)
class Fault:
    """A broken law.

    Attributes:
        target: Name of the target.
        kind: "slow", "memory", "access", "crash", "hang" or the name of an exception's class.
        place: "file:function" of our code that was running.
        detail: Text for a person.
    """

    target: str
    kind: str
    place: str
    detail: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Faults of the same key are counted as one."""
        return self.target, self.kind, self.place

    @property
    def file_name(self) -> str:
        """Name for the input that reveals the fault."""
        digest = hashlib.sha256(self.place.encode()).hexdigest()[:6]
        return f"{self.kind}-{self.place.rpartition(':')[2].strip('<>')}-{digest}"


class TooSlow(BaseException):
    """Raised inside of a parser that has run for `GIVE_UP_SECONDS`."""


class Checker:
    """Runs inputs of one target and checks the laws."""

    def __init__(self, target: Target, folder: Path) -> None:
        """Prepare the target. folder: becomes the current directory."""
        self._target, self._folder = target, folder
        os.chdir(folder)
        target.prepare()
        self._guard = Guard(folder)
        self._memory = _Memory()
        self._slow_place = ""
        signal.signal(signal.SIGPROF, self._alarm)

    def run(self, data: bytes) -> Fault | None:
        """Run one input, and return the fault that it reveals."""
        raised: BaseException | None = None
        self._slow_place = ""
        with self._memory.growth() as grown:
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, GIVE_UP_SECONDS - MAX_SECONDS)
            try:
                with self._guard.active():
                    self._target.check(data)
            except FledgeError:
                pass
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:
                raised = error
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            seconds = time.process_time() - start
        return self._fault(raised, seconds, grown[0])

    def _fault(self, raised: BaseException | None, seconds: float, grown: int) -> Fault | None:
        name = self._target.name
        if self._guard.violation:
            place = place_of(raised.__traceback__) if raised else "hidden"
            return Fault(name, ACCESS, place, self._guard.violation)
        if raised is not None and not isinstance(raised, TooSlow):
            kind, place = type(raised).__name__, place_of(raised.__traceback__)
            return Fault(name, kind, place, f"{_short(raised)}\n{_tail(raised)}")
        if seconds > MAX_SECONDS:
            detail = f"{seconds:.1f} s of CPU time; at most {MAX_SECONDS:g} are allowed"
            return Fault(name, SLOW, self._slow_place or "unknown", detail)
        if grown > MAX_GROWTH:
            detail = f"{grown / 1e6:.0f} MB more; at most {MAX_GROWTH / 1e6:g} are allowed"
            return Fault(name, MEMORY, "memory", detail)
        return None

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if not self._slow_place:
            self._slow_place = place_of_frame(frame)
        else:
            raise TooSlow


def place_of(trace: TracebackType | None) -> str:
    """Return "file:function" of the innermost frame in our packages.

    If the exception was raised in another package, its innermost frame is not part of the place.
    """
    frames = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    return _place([(code.co_filename, code.co_qualname) for code in frames])


def place_of_frame(frame: FrameType | None) -> str:
    frames = [
        (one.f_code.co_filename, one.f_code.co_qualname) for one, _ in traceback.walk_stack(frame)
    ]
    return _place(frames[::-1])


def _place(frames: list[tuple[str, str]]) -> str:
    ours = [(file, name) for file, name in frames if file.startswith(PACKAGES)]
    found = ours or [(file, name) for file, name in frames if file.startswith(_FUZZ)] or frames
    if not found:
        return "unknown"
    file, name = found[-1]
    return f"{os.path.relpath(file, ROOT)}:{name}"


class _Memory:
    """Measures the growth of this process's resident memory, at its peak. Linux alone."""

    def __init__(self) -> None:
        # Not `ru_maxrss`: that also counts what the process was before it started Python.
        self._status = os.open("/proc/self/status", os.O_RDONLY)

    @contextmanager
    def growth(self) -> Iterator[list[int]]:
        """Measure the `with` block. The value of the list is set at its end, in bytes."""
        grown = [0]
        peak, before = self._read()
        yield grown
        after, _ = self._read()
        if after > peak:  # else the block needed no more than an earlier one
            grown[0] = after - before
        if after - before > MAX_GROWTH // 2:
            # Lets the next large input raise the peak again.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def _read(self) -> tuple[int, int]:
        """Return peak and current resident memory, in bytes."""
        text = os.pread(self._status, 4096, 0)
        peak, resident = (
            int(text.partition(name)[2].split(maxsplit=1)[0]) * 1024
            for name in (b"VmHWM:", b"VmRSS:")
        )
        return peak, resident


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _tail(error: BaseException, most: int = 6) -> str:
    """Return the last frames of a traceback, one a line."""
    frames: Any = traceback.extract_tb(error.__traceback__)[-most:]
    return "\n".join(f"    {one.filename}:{one.lineno} {one.name}" for one in frames)
