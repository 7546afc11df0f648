"""A log that nobody reads stops no request and no shutdown."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from serving.server import log_queue
from tests.hostile.images import noisy_tiff
from tests.support.live_server import NO_TLS, ROOT, client, free_port, get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@contextmanager
def unread(folder: Path, tmp_path: Path, *options: str) -> Iterator[str]:
    """A service whose log nobody reads; at the end it must stop within 8 s. Yields its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "fledge", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_until_ready(url, process)
        yield url
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(12) == 0
        assert time.monotonic() - started < 8
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


@pytest.mark.process
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_pipe_that_nobody_reads_stops_nothing(folder: Path, tmp_path: Path, workers: str):
    with unread(folder, tmp_path, "--workers", workers) as url:
        data = photo(1)
        with client(url) as caller:
            long = "/" + "x" * 4000
            for number in range(3000):  # 6 MB of log; the pipe takes 64 KB
                assert caller.get(long).status_code == 404
                if number % 500 == 0:
                    assert caller.post("/predict", content=data).status_code == 200
        text = get(f"{url}/metrics").text
        dropped = re.search(r"^fledge_log_dropped_total ([0-9.e+]+)", text, re.MULTILINE)
        assert dropped
        if workers == "1":  # with two, each has a queue of its own
            assert float(dropped[1]) > 100


@pytest.mark.process
def test_what_libtiff_prints_to_a_pipe_that_nobody_reads_stops_nothing(
    folder: Path, tmp_path: Path
):
    with unread(folder, tmp_path) as url, client(url) as caller:
        broken = _broken_lzw()
        for _ in range(4):
            assert caller.post("/predict", content=noisy_tiff()).status_code in (200, 422)
        for _ in range(1500):  # a line each, decoded in the service; the pipe takes 64 KB
            assert caller.post("/predict", content=broken).status_code == 422
        assert caller.post("/predict", content=photo(1)).status_code == 200
        assert caller.get("/readyz").status_code == 200


def _broken_lzw() -> bytes:
    """A small TIFF whose strip is no LZW code: libtiff writes a line to stderr."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "TIFF", compression="tiff_lzw")
    data = file.getvalue()
    strip = data.rindex(b"\x80\0")
    return data[:strip] + b"\x80" + b"\xff" * 8 + data[strip + 9 :]


_PRINT = (
    "import ctypes, sys\n"
    "from serving.server import log_queue\n"
    "log_queue.install()\n"
    "libc = ctypes.CDLL(None)\n"
    "for _ in range(10_000): libc.perror(b'printed in C')\n"
    "print('not blocked', flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
def test_what_is_printed_in_c_never_blocks(kind: str):
    """A terminal whose output is stopped, a pipe and a socket that nobody reads."""
    if kind == "pipe":
        reader, stderr = os.pipe()
    elif kind == "terminal":
        reader, stderr = pty.openpty()
    else:
        reader, stderr = (one.detach() for one in socket.socketpair())
    before = os.get_blocking(stderr)
    process = subprocess.Popen(
        [sys.executable, "-c", _PRINT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    try:
        assert select.select([process.stdout], [], [], 20)[0]
        assert process.stdout.readline() == b"not blocked\n"
        assert kind == "socket" or os.get_blocking(stderr) == before  # the shell has it too
        process.stdin.close()
        assert process.wait(20) == 0
        assert os.read(reader, 100).startswith(b"printed in C")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for end in (reader, stderr):
            os.close(end)


def test_the_message_of_an_abort_reaches_stderr():
    code = (
        "import ctypes, faulthandler\n"
        "faulthandler.enable()\n"
        "from serving.server import log_queue\n"
        "log_queue.install()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.perror(b'last words')\n"
        "libc.abort()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "last words" in done.stderr
    assert "Fatal Python error: Aborted" in done.stderr


def _wait_until_ready(url: str, process: subprocess.Popen) -> None:
    import httpx

    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False, verify=NO_TLS).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the service did not start")


def test_a_line_has_the_callers_address(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log") as server:
        post(f"{server.url}/predict", photo(1))
        until = time.monotonic() + 5
        while '"/predict"' not in (text := server.log.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
    line = next(json.loads(line) for line in text.splitlines() if '"/predict"' in line)
    assert (line["client"], line["status"]) == ("127.0.0.1", 200)


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_lines_are_dropped_and_counted_when_the_queue_is_full(pipe, monkeypatch):
    reader, descriptor = pipe
    monkeypatch.setattr(log_queue, "MAX_LINES", 100)
    counted: list[int] = []
    monkeypatch.setattr(log_queue, "_count_dropped", lambda: counted.append(1))
    writer = log_queue.LogWriter(descriptor)
    started = time.monotonic()
    for number in range(5000):
        writer.put(b"%04d" % number + b"x" * 995 + b"\n")
    assert time.monotonic() - started < 2
    assert writer.dropped == len(counted) > 4000
    started = time.monotonic()
    writer.flush(0.1)
    assert 0.05 < time.monotonic() - started < 2
    parts: list[bytes] = []

    def read() -> None:
        while b"end\n" not in b"".join(parts[-2:]):
            parts.append(os.read(reader, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    writer.flush(10)
    writer.put(b"end\n")
    thread.join(10)
    lines = b"".join(parts).splitlines()
    written = [line for line in lines if line.endswith(b"x")]
    told = sum(json.loads(line)["lines"] for line in lines if line.startswith(b"{"))
    assert len(written) + told == 5000
    assert told == writer.dropped
    assert [line[:4] for line in written] == sorted(line[:4] for line in written)


def test_the_handlers_of_the_standard_streams_are_replaced(capfd):
    code = (
        "import logging, sys\n"
        "from serving.server import log_queue\n"
        "log = logging.getLogger('some')\n"
        "handler = logging.StreamHandler(sys.stdout)\n"
        "handler.setFormatter(logging.Formatter('<%(message)s>'))\n"
        "handler.addFilter(lambda record: record.msg != 'hidden')\n"
        "handler.setLevel(logging.WARNING)\n"
        "log.addHandler(handler)\n"
        "log.setLevel(logging.DEBUG)\n"
        "log_queue.install()\n"
        "assert type(log.handlers[0]) is log_queue.QueueHandler, log.handlers\n"
        "log.info('low'); log.error('hidden'); log.error('shown \\ud800'); log.error('%d', 'x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "<shown \\ud800>\n"
    assert "Logging error" in done.stderr


def test_other_handlers_are_left(tmp_path: Path):
    log = logging.getLogger("serving.test.other_handlers")
    handler = logging.FileHandler(tmp_path / "file")
    log.addHandler(handler)
    try:
        log_queue.install()
        assert log.handlers == [handler]
    finally:
        log.removeHandler(handler)
        handler.close()


def test_a_reader_that_is_gone_ends_nothing():
    reader, descriptor = os.pipe()
    os.close(reader)
    writer = log_queue.LogWriter(descriptor)
    for _ in range(100):
        writer.put(b"line\n")
        writer.flush(5)
    os.close(descriptor)
