"""A worker that dies takes the service with it, and so does a terminal that is closed.

Left alone, BentoML's launcher would notice within ten seconds and start another; meanwhile half the
callers, or all of them, would wait for nobody. What runs the service, a restart policy or
Kubernetes, sees an end at once, and counts it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOOK: Final = 0.25
"""Seconds between two looks for new workers."""
_WORKER: Final = b"_bentoml_impl.worker.service"
"""Stands in the command line of BentoML's workers, and of no orphan that this process inherits."""
_TOLD_TO_STOP: Final = (signal.SIGTERM, signal.SIGINT)


def watch_workers() -> None:
    """Called once by the launcher, before it starts its workers. On Linux; elsewhere BentoML's way.

    What ends in order is to be registered with `atexit` after this: handlers run last to first, and
    the one registered here ends the process with 1, where the launcher itself would end with 0.
    """
    if not Path("/proc/self/task").is_dir():
        return
    _exit_on_hangup()
    died = threading.Event()
    atexit.register(lambda: os._exit(1) if died.is_set() else None)
    threading.Thread(target=_watch, args=(died,), name="fledge-fate", daemon=True).start()


def _exit_on_hangup() -> None:
    """A closed terminal ends the service in order, unless `nohup` started it.

    BentoML's launcher would start its workers anew at SIGHUP, behind a door that the old ones have
    shut for good.
    """
    # Not by a mask: a thread of numpy's, which is older, would take the signal.
    from circus.sighandler import SysHandler  # type: ignore[import-untyped]

    stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    SysHandler.handle_hup = (lambda _: None) if stays else SysHandler.handle_term


def _watch(died: threading.Event) -> None:
    known: set[int] = set()
    while True:
        for pid in set(_workers()) - known:
            known.add(pid)
            threading.Thread(target=_await, args=(pid, died), daemon=True).start()
        time.sleep(_LOOK)


def _workers() -> Iterator[int]:
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            for pid in path.read_text().split():
                with suppress(OSError):  # a child that has
                    if _WORKER in Path(f"/proc/{pid}/cmdline").read_bytes():
                        yield int(pid)


def _await(pid: int, died: threading.Event) -> None:
    try:
        # WNOWAIT: it stays for the launcher to bury.
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return
    if end is None or _was_told_to_stop(end) or died.is_set():
        return
    died.set()
    how = "exit status" if end.si_code == os.CLD_EXITED else "signal"
    message = f"fledge: worker {pid} ended with {how} {end.si_status}; so does the service"
    print(message, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _was_told_to_stop(end: os.waitid_result) -> bool:
    if end.si_code == os.CLD_EXITED:
        return end.si_status == 0
    return end.si_status in _TOLD_TO_STOP
