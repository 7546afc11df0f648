"""Functions about processes: how this one ends, and whether another runs."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from serving.terminal import show

_PR_SET_PDEATHSIG: Final = 1


def exit_process(status: int) -> NoReturn:
    """Run the `atexit` handlers, flush stdout and stderr, and exit without waiting for threads.

    The teardown of loaded modules is skipped, because with torch it takes a second.

    Args:
        status: Exit status. If it is 0 and flushing fails, for example because the disk is full,
            the exit status is 1.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BlockingIOError:  # nobody reads stderr, which `log_queue` has unblocked
        os._exit(status)
    except (OSError, RuntimeError) as error:  # a full disk; an interrupted write
        where = getattr(error, "filename", None) or "the output can't be written"
        reason = getattr(error, "strerror", None) or error
        with suppress(OSError):
            if status == 0:  # otherwise an error was told already
                show(f"fledge: {where}: {reason}", sys.stderr, flush=True)
        os._exit(status or 1)
    os._exit(status)


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends; only on Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def be_ended_first() -> None:
    """Have this process killed first when the memory of the container runs out; only on Linux."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def is_running(pid: int) -> bool:
    """Return whether a process with this process id is running on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
