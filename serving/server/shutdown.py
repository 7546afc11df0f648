"""Graceful shutdown of a worker process, and exit of the service when a worker crashes.

`GracefulShutdown` runs in each worker. On a stop signal, the worker stops accepting connections and
lets open requests finish. BentoML's launcher process keeps the listening socket open until all
workers have exited; meanwhile the kernel would accept connections that no process serves. Therefore
the worker calls `socket.shutdown`, which affects the socket in all processes. From then on, the
kernel refuses new connections, and a client can connect to another replica of the service.

`watch_workers` runs in BentoML's launcher. It stops the service when a worker exits unexpectedly.
Without it, the launcher would start another worker within ten seconds, and requests in these
seconds could get no answer. A supervisor such as systemd or Kubernetes notices the exit of the
service immediately and can restart it.
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
from serving.terminal import show

if TYPE_CHECKING:
    import uvicorn

DRAIN_SECONDS: Final = 0.3
"""Time between closing the listening socket and stopping the server. In this time, clients whose
connection was already accepted can send their request."""

_MAX_ACCEPT_TURNS: Final = 1000
"""Largest number of event loop iterations in which pending connections are accepted."""
_START_POLL_SECONDS: Final = 0.02
_SCAN_SECONDS: Final = 1.0
"""Time between two scans for new worker processes. A worker takes longer than this to start, so
each worker is found before it serves. The exit of a worker that was found is noticed at once."""
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class GracefulShutdown:
    """Handler of the signals that stop a worker process (SIGTERM and SIGINT).

    Attributes:
        started: Whether the shutdown has begun. `App` then adds `Connection: close` to every
            response.
    """

    started = False

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Replace uvicorn's signal handlers. Does nothing in a process without uvicorn server."""
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
    """Stop BentoML's launcher with exit status 1 when a worker exits unexpectedly; only on Linux.

    Also makes SIGHUP stop the launcher, unless SIGHUP is ignored, as under `nohup`.

    Call this function once, in the launcher, before the launcher starts its workers. The function
    registers an `atexit` handler that ends the process after a crash of a worker. Register other
    `atexit` handlers after this call: `atexit` runs the latest handler first.
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
    text = f"fledge: worker {pid} ended with {how} {status.si_status}; stopping the service"
    show(text, sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_orderly(status: os.waitid_result) -> bool:
    if status.si_code == os.CLD_EXITED:
        return status.si_status == 0
    return status.si_status in _STOP_SIGNALS
