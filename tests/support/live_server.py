"""A real service in a separate process, over loopback."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from serving.server.bentoml_compat import WORKER_MODULE
from tests.support.fork_server import ROOT, ForkedProcess, ForkServer, Signals

Process = subprocess.Popen[str] | ForkedProcess

# By default each client of httpx reads the certificates of all authorities, which takes longer than
# the request.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
DEFAULTS = Signals()
# BentoML and others read such variables when they are imported.
_READ_AT_IMPORT = ("BENTOML_", "PROMETHEUS_", "OTEL_")


@dataclass
class Live:
    url: str
    port: int
    process: Process
    log: Path

    def stop(self, sent: int = signal.SIGTERM) -> int:
        self.process.send_signal(sent)
        return self.process.wait(30)

    def workers(self) -> list[int]:
        """Process ids of the launcher's workers, or of the only process."""
        children = psutil.Process(self.process.pid).children()
        workers = [child.pid for child in children if WORKER_MODULE in child.cmdline()]
        return workers or [self.process.pid]


def get(url: str) -> httpx.Response:
    """GET without a proxy; the timeout allows for a machine under load."""
    return httpx.get(url, timeout=60, trust_env=False, verify=NO_TLS)


def post(url: str, data: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    """POST; see `get`."""
    options: dict[str, Any] = {"timeout": 60, "trust_env": False, "verify": NO_TLS}
    return httpx.post(url, content=data, headers=headers, **options)


def client(url: str) -> httpx.Client:
    """A client that keeps its connection; see `get`."""
    return httpx.Client(base_url=url, timeout=60, trust_env=False, verify=NO_TLS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def _fork_server() -> ForkServer:
    return ForkServer()


def launch(
    folder: Path,
    port: int,
    log: Path,
    *,
    signals: Signals = DEFAULTS,
    new_interpreter: bool = False,
    **env: str,
) -> Process:
    """Start what `fledge serve` starts, without its command line.

    Args:
        folder: The bundle.
        port: Of the service.
        log: File for stdout and stderr.
        signals: Of the service at its start.
        new_interpreter: Whether to start Python anew; otherwise see `fork_server`.
        env: Environment variables; those of the tests that begin with FLEDGE_ are left out.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("FLEDGE_")
    }
    environ = {**inherited, "TMPDIR": str(log.parent), **env}
    if not new_interpreter and not any(name.startswith(_READ_AT_IMPORT) for name in env):
        return _fork_server().start(folder, port, log, environ, signals)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from serving.errors import FledgeError\n"
        "from serving.server.launch import serve\n"
        "from tests.support.fork_server import Signals\n"
        "Signals(**json.loads(sys.argv[3])).apply()\n"
        "try: serve(Path(sys.argv[1]), port=int(sys.argv[2]))\n"
        "except FledgeError as error: print(error, file=sys.stderr); sys.exit(error.exit_status)\n"
    )
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(port), json.dumps(asdict(signals))],
            cwd=ROOT,
            env=environ,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@contextmanager
def live(folder: Path, log: Path, **options: Any) -> Iterator[Live]:
    """A service that is ready; stopped at the end of the block. Options: those of `launch`."""
    port = free_port()
    process = launch(folder, port, log, **options)
    server = Live(f"http://127.0.0.1:{port}", port, process, log)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                if get(f"{server.url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the service did not start:\n{log.read_text()}")
            time.sleep(0.02)
        yield server
    finally:
        if process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
