"""A real service in a separate process, over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from serving.server.bentoml_compat import WORKER_MODULE

ROOT = Path(__file__).parents[2]


@dataclass
class Live:
    url: str
    port: int
    process: subprocess.Popen[str]
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
    return httpx.get(url, timeout=60, trust_env=False)


def post(url: str, data: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    """POST; see `get`."""
    return httpx.post(url, content=data, headers=headers, timeout=60, trust_env=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(folder: Path, port: int, log: Path, **env: str) -> subprocess.Popen[str]:
    """Start what `fledge serve` starts, without its command line."""
    code = (
        "import sys; from pathlib import Path\n"
        "from serving.errors import FledgeError\n"
        "from serving.server.launch import serve\n"
        "try: serve(Path(sys.argv[1]), port=int(sys.argv[2]))\n"
        "except FledgeError as error: print(error, file=sys.stderr); sys.exit(error.exit_status)\n"
    )
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("FLEDGE_")
    }
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(port)],
            cwd=ROOT,
            env={**inherited, "TMPDIR": str(log.parent), **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@contextmanager
def live(folder: Path, log: Path, **env: str) -> Iterator[Live]:
    """A service that is ready; stopped at the end of the block."""
    port = free_port()
    process = launch(folder, port, log, **env)
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
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
