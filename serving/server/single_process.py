"""Run the service as a single process, without BentoML's launcher.

The launcher is a process of its own, which takes as much memory as a worker and only waits for the
worker. This module replaces the launcher if there is one worker: it passes the bound socket to the
worker code, and exits with status 0 after a stop signal. If the worker crashes, the process ends.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from serving.server import bentoml_compat
from serving.utils.process import exit_process

ROOT: Final = Path(__file__).resolve().parents[2]
"""The folder that contains the package `serving`."""
SERVICE: Final = "serving.service:ImageClassifier"


def serve(listener: socket.socket, environ: Mapping[str, str], grace: int) -> NoReturn:
    """Serve until a stop signal, then exit with status 0; exit with status 1 if the server failed.

    Args:
        listener: A bound socket that does not listen yet.
        environ: Environment variables for `serving.settings`, with absolute paths.
        grace: Seconds that open requests have to finish after SIGTERM.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_during_start)
    hangup = getattr(signal, "SIGHUP", None)
    if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # `nohup` ignores it
        signal.signal(hangup, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    os.environ.update(environ)
    # Without this variable, prometheus_client keeps metrics in memory; with it, in files that
    # survive a crash.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    # BentoML adds the current folder to sys.path, and no module must come from the user's folder.
    os.chdir(ROOT)
    gc.set_threshold(700, 10, 10)  # Python's defaults; the command line collects less often
    try:
        _run_worker(listener, grace)
    except SystemExit as error:  # uvicorn's, if it could not start
        exit_process(1 if error.code else 0)
    except Exception:  # a fault of the server; the log gets the traceback
        traceback.print_exc()
        exit_process(1)
    exit_process(0)


def _run_worker(listener: socket.socket, grace: int) -> None:
    from prometheus_client import disable_created_metrics

    # With several workers there are no `_created` series either.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    bentoml_compat.keep_metrics_in_memory()
    command = [SERVICE, "--fd", listener.detach(), "--worker-id", 1]
    command += ["--timeout-graceful-shutdown", grace]
    bentoml_compat.run_worker([*map(str, command)])


def _exit_during_start(*_: Any) -> None:
    """Handle a stop signal that arrives before uvicorn has installed its handlers: exit at once.

    When uvicorn stops, it raises the signals that it has received a second time, inside its event
    loop. This handler ignores a signal inside an event loop, and the loop ends normally.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Not by raising an exception, which may be lost in the middle of an import.
        exit_process(0)
