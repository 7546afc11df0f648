"""Graceful shutdown of a worker, and exit of the service when a worker fails.

In a worker, `GracefulShutdown` stops accepting connections and lets open requests finish. It shuts
the listening socket down for all processes before the server stops, because BentoML's launcher
keeps that socket open until its workers have exited. Until then, the kernel would accept
connections that no process serves, and reset them at the end. With the socket shut down, a new
connection is refused at once, and the client can use another replica.

In BentoML's launcher, `watch_workers` stops the service when a worker exits unexpectedly, or on
SIGHUP. The launcher itself would start another worker within ten seconds, and meanwhile some or all
requests would get no answer. The supervisor that runs the service, such as systemd or Kubernetes,
sees the exit at once and can restart the service.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import psutil  # type: ignore[import-untyped]

from serving.server import bentoml_compat

if TYPE_CHECKING:
    import uvicorn

DRAIN_SECONDS: Final = 0.3
"""Time between closing the listening socket and stopping the server, so that accepted connections
can send their request."""

_MAX_ACCEPT_TURNS: Final = 1000
"""Largest number of turns of the event loop in which pending connections are accepted."""
_START_POLL_SECONDS: Final = 0.02
_SCAN_SECONDS: Final = 1.0
"""Time between two scans for new workers. A worker takes longer than that to start; once it is
seen, its exit is noticed at once."""
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class GracefulShutdown:
    """Handles the signals that stop a worker.

    started: whether the shutdown has begun; from then on every response has `Connection: close`.
    """

    started = False

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Replace uvicorn's signal handlers; does nothing in a process that runs no uvicorn."""
        server = bentoml_compat.running_uvicorn_server()
        if server is None:
            return

        def stop_server() -> None:
            # Always SIGTERM, because at a second SIGINT uvicorn would drop the open requests.
            server.handle_exit(signal.SIGTERM, None)

        def handle(*_: Any) -> None:
            loop.call_soon_threadsafe(
                self._stop_accepting, loop, server, stop_server, _MAX_ACCEPT_TURNS
            )

        for number in _STOP_SIGNALS:
            signal.signal(number, handle)

    def _stop_accepting(
        self,
        loop: asyncio.AbstractEventLoop,
        server: uvicorn.Server,
        stop_server: Callable[[], None],
        turns: int,
    ) -> None:
        if self.started:  # a second signal, from the launcher or sent to the process group
            return
        if not server.started:  # it does not listen yet
            loop.call_later(
                _START_POLL_SECONDS, self._stop_accepting, loop, server, stop_server, turns
            )
            return
        sockets = [listener for one in server.servers for listener in one.sockets]
        if turns and _has_pending_connections(sockets):  # the loop accepts them at its next turn
            loop.call_soon(self._stop_accepting, loop, server, stop_server, turns - 1)
            return
        self.started = True
        # `close` of a server closes the socket in this process only; `shutdown` of a duplicate also
        # stops the launcher's socket.
        duplicates = [socket.socket(fileno=os.dup(listener.fileno())) for listener in sockets]
        for one in server.servers:
            one.close()
        for duplicate in duplicates:
            with contextlib.suppress(OSError):  # another worker has shut it down already
                duplicate.shutdown(socket.SHUT_RDWR)
            duplicate.close()
        loop.call_later(DRAIN_SECONDS, stop_server)


def _has_pending_connections(sockets: Iterable[socket.socket]) -> bool:
    poll = select.poll()
    for listener in sockets:
        poll.register(listener, select.POLLIN)
    return any(event == select.POLLIN for _, event in poll.poll(0))


def watch_workers() -> None:
    """Stop the launcher, with exit status 1, when a worker exits unexpectedly. On Linux only.

    Call it once, in the launcher, before it starts its workers. Register other `atexit` handlers
    after this call, because handlers run in reverse order, and after a failure the handler
    registered here ends the process with status 1, where the launcher would exit with 0.
    """
    if not psutil.LINUX:
        return
    # `nohup` ignores SIGHUP; otherwise a closed terminal stops the service.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    bentoml_compat.set_launcher_hangup_action(stop=not ignored)
    failed = threading.Event()
    atexit.register(lambda: os._exit(1) if failed.is_set() else None)
    threading.Thread(
        target=_watch, args=(failed,), name="fledge-watch-workers", daemon=True
    ).start()


def _watch(failed: threading.Event) -> None:
    known: set[int] = set()
    while True:
        for pid in set(_workers()) - known:
            known.add(pid)
            threading.Thread(target=_wait_for_exit, args=(pid, failed), daemon=True).start()
        time.sleep(_SCAN_SECONDS)


def _workers() -> Iterator[int]:
    # Not `Process.children`: it fails as a whole if the kernel hides one process of another user.
    for process in psutil.process_iter(["ppid"]):
        with contextlib.suppress(psutil.Error, OSError):  # it has just exited
            is_child = process.info["ppid"] == os.getpid()
            if is_child and bentoml_compat.WORKER_MODULE in process.cmdline():
                yield process.pid


def _wait_for_exit(pid: int, failed: threading.Event) -> None:
    try:
        # WNOWAIT leaves the exit status for the launcher, which reaps its children itself.
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return
    if status is None or _is_orderly(status) or failed.is_set():
        return
    failed.set()
    how = "exit status" if status.si_code == os.CLD_EXITED else "signal"
    print(
        f"fledge: worker {pid} ended with {how} {status.si_status}; stopping the service",
        file=sys.stderr,
        flush=True,
    )
    os.kill(os.getpid(), signal.SIGTERM)


def _is_orderly(status: os.waitid_result) -> bool:
    if status.si_code == os.CLD_EXITED:
        return status.si_status == 0
    return status.si_status in _STOP_SIGNALS
