"""Run a command to its end and measure its time, CPU time and memory."""

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
_SAMPLE_INTERVAL: Final = 0.1


class Failed(Exception):
    """A command failed; the message names its log."""


@dataclass(frozen=True)
class Usage:
    """Resources that a command used.

    seconds: From its start to its end. cpu: Seconds of CPU time of all its processes.
    memory: (seconds since the start, MB), sampled ten times a second: the sum of the resident set
        sizes of all its processes, in which shared pages count once per process.
    """

    seconds: float
    cpu: float
    memory: tuple[tuple[float, float], ...]

    @property
    def peak(self) -> float:
        """The most memory, in MB."""
        return max((size for _, size in self.memory), default=0.0)


def run(command: Sequence[str], env: Mapping[str, str], log: Path) -> Usage:
    """Run a command with its output in `log`; its process group is killed on any exit.

    Raises:
        Failed: Its exit status was not 0.
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
    cpu = sum(after[2:4]) - sum(before[2:4])  # times of ended children and their descendants
    return Usage(seconds, cpu, tuple(memory))


def _watch(
    process: subprocess.Popen[bytes], started: float, memory: list[tuple[float, float]]
) -> int:
    while True:
        memory.append((time.perf_counter() - started, _resident(process.pid)))
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_SAMPLE_INTERVAL)


def _resident(pid: int) -> float:
    """MB of a process and its descendants; 0 after their end."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for member in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss / MB
    return total
