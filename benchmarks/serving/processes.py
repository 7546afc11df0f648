"""Run a server in its own process: start, wait until ready, measure CPU and memory, stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

HOST: Final = "127.0.0.1"
START: Final = 120.0
"""Seconds until the server must be ready."""
GRACE: Final = 10.0
"""Seconds between SIGTERM and SIGKILL."""
MB: Final = 1e6
_POLL: Final = 0.05


class Failed(Exception):
    """A server did not become ready; the message names its log."""


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready. seconds: from the start of its process until it was ready."""

    pid: int
    port: int
    seconds: float


class Meter:
    """CPU time and memory of a process and its descendants.

    cpu: Seconds of CPU time between `start` and `stop`. rest: MB at construction. peak: The highest
    MB since `start` at any `sample`. MB is the sum of resident set sizes: shared pages count once
    per process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.cpu = 0.0
        self._update_tree()
        self.rest = self.peak = self._memory()

    def start(self) -> None:
        """Start counting, with the process tree of this moment."""
        self._update_tree()
        self.peak = self._memory()
        self._cpu_at_start = self._seconds()

    def sample(self) -> None:
        """Update `peak`."""
        self.peak = max(self.peak, self._memory())

    def stop(self) -> None:
        self.cpu = self._seconds() - self._cpu_at_start

    def _update_tree(self) -> None:
        self._tree = [self._root, *self._root.children(recursive=True)]
        for process in self._tree:
            _restrict_affinity(process.pid)

    def _seconds(self) -> float:
        total = 0.0
        for process in self._tree:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _memory(self) -> float:
        total = 0.0
        for process in self._tree:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss / MB
        return total


def _restrict_affinity(pid: int) -> None:
    """Restrict threads that a runtime pinned to other cores to the cores of this process."""
    if not hasattr(os, "sched_getaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    with suppress(OSError):
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            with suppress(ProcessLookupError):
                if not os.sched_getaffinity(thread) <= allowed:
                    os.sched_setaffinity(thread, allowed)


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], env: Mapping[str, str], port: int, ready: str, log: Path
) -> Iterator[RunningServer]:
    """Run `command` for the duration of the block, which starts once GET `ready` returned 200.

    Raises:
        Failed: The server exited, or was not ready within two minutes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, process_group=0
        )
    try:
        _wait(process, f"http://{HOST}:{port}{ready}", log)
        yield RunningServer(process.pid, port, time.perf_counter() - started)
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    opener = build_opener(ProxyHandler({}))  # a proxy cannot reach the loopback
    deadline = time.monotonic() + START
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(URLError, OSError), opener.open(url, timeout=START) as response:
            if response.status == 200:
                return
        time.sleep(_POLL)
    tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-12:])
    raise Failed(f"{log.stem} did not become ready; {log} ends:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM; after `GRACE` seconds kill the process and its descendants."""
    tree: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for child in psutil.wait_procs(tree, timeout=1)[1]:
        with suppress(psutil.NoSuchProcess):
            child.kill()
