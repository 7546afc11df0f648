"""A server in a fresh process: started, waited for, weighed, ended. Never two at once."""

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
GRACE: Final = 10.0
MB: Final = 1e6
_TICK: Final = 0.05


class Failed(Exception):
    """A server did not come up; the message names its log."""


@dataclass(frozen=True)
class Live:
    """A server that is ready. seconds: from the start of its process."""

    pid: int
    port: int
    seconds: float


class Meter:
    """Processor time and memory of a process and of all below it.

    cpu: seconds between `start` and `stop`. rest: MB when made. peak: the highest MB at a `look`.
    MB are resident sets added up: what processes share counts once for each.
    """

    def __init__(self, pid: int) -> None:
        """Look at the tree for the first time."""
        self._root = psutil.Process(pid)
        self.cpu = 0.0
        self._find()
        self.rest = self.peak = self._memory()

    def start(self) -> None:
        """Begin to count; processes that came meanwhile are found."""
        self._find()
        self.peak = self._memory()
        self._begun = self._seconds()

    def look(self) -> None:
        """Weigh."""
        self.peak = max(self.peak, self._memory())

    def stop(self) -> None:
        """End counting."""
        self.cpu = self._seconds() - self._begun

    def _find(self) -> None:
        self._tree = [self._root, *self._root.children(recursive=True)]
        for process in self._tree:
            _keep(process.pid)

    def _seconds(self) -> float:
        found = 0.0
        for process in self._tree:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found += times.user + times.system
        return found

    def _memory(self) -> float:
        found = 0.0
        for process in self._tree:
            with suppress(psutil.NoSuchProcess):
                found += process.memory_info().rss / MB
        return found


def _keep(pid: int) -> None:
    """Bring back threads that went to other cores than ours: some runtimes pin their own."""
    if not hasattr(os, "sched_getaffinity"):
        return
    mine = os.sched_getaffinity(0)
    with suppress(OSError):
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            with suppress(ProcessLookupError):
                if not os.sched_getaffinity(thread) <= mine:
                    os.sched_setaffinity(thread, mine)


def free_port() -> int:
    """A port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], env: Mapping[str, str], port: int, ready: str, log: Path
) -> Iterator[Live]:
    """Run `command` until the end of the block; inside it, GET `ready` has answered 200.

    Raises:
        Failed: It ended, or took more than two minutes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, process_group=0
        )
    try:
        _wait(process, f"http://{HOST}:{port}{ready}", log)
        yield Live(process.pid, port, time.perf_counter() - started)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    ask = build_opener(ProxyHandler({}))  # the server is near; a proxy would not find it
    until = time.monotonic() + START
    while process.poll() is None and time.monotonic() < until:
        with suppress(URLError, OSError), ask.open(url, timeout=START) as response:
            if response.status == 200:
                return
        time.sleep(_TICK)
    tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-12:])
    raise Failed(f"{log.stem} did not come up; {log} ends:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then make it, and all that it has started."""
    tree: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for one in psutil.wait_procs(tree, timeout=1)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
