"""Exit this process without waiting for threads, and check whether a process is running."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from serving.terminal import show


def exit_process(status: int) -> NoReturn:
    """Run the `atexit` handlers, flush stdout and stderr, and exit without waiting for threads.

    The teardown of loaded modules is skipped, because with torch it takes a second.

    Args:
        status: Exit status. If it is 0 and flushing fails, the exit status is 120, as in Python.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, RuntimeError) as error:  # a closed pipe; an interrupted write
        with suppress(OSError):
            show(repr(error), sys.stderr, flush=True)
        os._exit(status or 120)  # Python's own status when the final flush fails
    os._exit(status)


def is_running(pid: int) -> bool:
    """Return whether a process with this process id is running on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
