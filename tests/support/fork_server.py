"""A process that has imported BentoML and forks a service for each test that asks for one.

The imports take seconds, the rest of a start a few tenths of one. A forked service runs the code
that `fledge serve` runs, with the same signals and exit status; only its modules are loaded before.
Tests marked `process` start services by a new interpreter instead.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.abc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class ForkedProcess:
    """A child of the fork server, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, server: ForkServer) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(status=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("service", timeout or 0)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # the server keeps the process id until it has told the status
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The fork server of this process; ends with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"],
                cwd=ROOT,
                # Without a pool of threads in numpy, the process that forks has one thread.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
                stdin=theirs,
                start_new_session=True,
            )
        self._socket, self._answers = ours, ours.makefile("r")
        self._lock = threading.Lock()
        atexit.register(self._end)

    def start(
        self, folder: Path, port: int, log: Path, env: Mapping[str, str], signals: Signals
    ) -> ForkedProcess:
        log.write_text("")  # it is there at once, as after `Popen`
        request = {"folder": str(folder), "port": port, "log": str(log), "env": dict(env)}
        return ForkedProcess(self.ask(**request, signals=asdict(signals)), self)

    def ask(self, **request: Any) -> Any:
        with self._lock:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(self._answers.readline())

    def _end(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(10)


@dataclass(frozen=True)
class Signals:
    """Signals of a service at its start; all but `ignored` have their default action.

    A test run under `nohup` or in the background hands on that it ignores some.

    Attributes:
        ignored: A signal that is ignored.
        sent: A signal that the process sends to itself at the place `at`.
        at: `package.module`: where this module is imported; `package.module:Class.method`: before
            this call.
    """

    ignored: int | None = None
    sent: int | None = None
    at: str = ""

    def apply(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.ignored is not None:
            signal.signal(self.ignored, signal.SIG_IGN)
        if self.sent is not None:
            _at(self.at, partial(os.kill, os.getpid(), self.sent))


def _at(place: str, act: Callable[[], None]) -> None:
    module, _, name = place.partition(":")
    if not name:
        sys.modules.pop(module, None)
        sys.meta_path.insert(0, _Finder(module, act))
        return
    *path, last = name.split(".")
    owner = reduce(getattr, path, importlib.import_module(module))
    original = getattr(owner, last)

    def call(*arguments: Any, **options: Any) -> Any:
        setattr(owner, last, original)
        act()
        return original(*arguments, **options)

    setattr(owner, last, call)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; acts when a module is about to be imported."""

    def __init__(self, module: str, act: Callable[[], None]) -> None:
        self._module, self._act = module, act

    def find_spec(self, name: str, *_: object) -> None:
        if name == self._module:
            self._act()


def _serve_requests(control: socket.socket) -> dict[str, Any] | None:
    """Answer requests; returns the request in a forked child, and None at the end."""
    running: set[int] = set()
    with control, control.makefile("r") as lines:
        for line in lines:
            request = json.loads(line)
            if "status" in request:
                pid, status = os.waitpid(request["status"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
                running.discard(pid)
            else:
                answer = os.fork()
                if not answer:
                    return request  # type: ignore[no-any-return]
                running.add(answer)
            control.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:  # left by a test that failed
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def _run(request: dict[str, Any]) -> None:
    from serving.errors import FledgeError
    from serving.server.launch import serve

    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
        os.set_inheritable(target, True)
    os.close(null)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    Signals(**request["signals"]).apply()
    try:
        serve(Path(request["folder"]), port=request["port"])
    except FledgeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from error


def _import_what_a_service_imports() -> None:
    """Import all but serving.service, which reads the settings when it is imported."""
    for module in (
        *("_bentoml_impl.loader", "_bentoml_impl.server.app", "_bentoml_impl.worker.service"),
        *("bentoml._internal.service.loader", "onnxruntime", "uvicorn.lifespan.on"),
        *("uvicorn.loops.uvloop", "uvicorn.protocols.http.httptools_impl"),
        *("serving.http.app", "serving.http.model_manager", "serving.http.telemetry"),
        *("serving.server.launch", "serving.utils.malloc"),
    ):
        importlib.import_module(module)


if __name__ == "__main__":
    _import_what_a_service_imports()
    found = _serve_requests(socket.socket(fileno=os.dup(0)))
    if found is not None:
        _run(found)
