"""A worker that dies takes the service with it.

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
from typing import Final

_TOLD_TO_STOP: Final = (signal.SIGTERM, signal.SIGINT)


def share() -> None:
    """Called once by the launcher, before it starts its workers."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return
    died = threading.Event()
    # Registered first, so it runs last: the launcher itself would end with 0.
    atexit.register(lambda: os._exit(1) if died.is_set() else None)
    threading.Thread(target=_watch, args=(died,), name="fledge-fate", daemon=True).start()


def _watch(died: threading.Event) -> None:
    while True:
        try:
            # WNOWAIT: it stays for the launcher to bury.
            end = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # none yet
            threading.Event().wait(0.05)
            continue
        if end is None or _was_told_to_stop(end):
            return
        died.set()
        how = "exit status" if end.si_code == os.CLD_EXITED else "signal"
        message = (
            f"fledge: worker {end.si_pid} ended with {how} {end.si_status}; so does the service"
        )
        print(message, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return


def _was_told_to_stop(end: os.waitid_result) -> bool:
    if end.si_code == os.CLD_EXITED:
        return end.si_status == 0
    return end.si_status in _TOLD_TO_STOP
