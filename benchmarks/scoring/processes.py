"""A command that is run to its end, and weighed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

MB: Final = 1e6
_TICK: Final = 0.1


class Failed(Exception):
    """It ended with an error; the message names its log."""


@dataclass(frozen=True)
class Ran:
    """What a command took.

    seconds: from its start to its end. cpu: seconds of the processor, of all its processes.
    memory: (seconds since the start, MB of all its processes), ten times a second: resident sets
        added up, so that what processes share counts once for each.
    """

    seconds: float
    cpu: float
    memory: tuple[tuple[float, float], ...]

    @property
    def peak(self) -> float:
        """The most memory, in MB."""
        return max((size for _, size in self.memory), default=0.0)


def run(command: Sequence[str], env: Mapping[str, str], log: Path) -> Ran:
    """Run it; what it says goes into `log`. On any way out nothing of it is left running.

    Raises:
        Failed: It ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    memory: list[tuple[float, float]] = []
    with log.open("w") as out:
        before = os.times()
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, process_group=0
        )
        try:
            status = _watch(process, started, memory)
            seconds = time.perf_counter() - started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        after = os.times()
    if status:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-12:])
        raise Failed(f"{log.stem} ended with status {status}; {log} ends:\n{tail}")
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children that ended, and of theirs
    return Ran(seconds, cpu, tuple(memory))


def _watch(
    process: subprocess.Popen[bytes], started: float, memory: list[tuple[float, float]]
) -> int:
    while True:
        memory.append((time.perf_counter() - started, _size(process.pid)))
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_TICK)


def _size(pid: int) -> float:
    found = 0.0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                found += one.memory_info().rss / MB
    return found
