"""Clients that ask and don't read, don't send what they announce, or ask far in advance."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn

from serving.server import bentoml_compat, connection_limits, http_protocol
from serving.server.connection_limits import ConnectionLimits
from tests.hostile.test_connections import connect, is_answered, refused_connections, rss
from tests.support.live_server import Live, free_port, live
from tests.support.tiny_bundle import photo

LARGE = b"GET /static_content/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"


def small_window(port: int, size: int = 4096) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    return client


@pytest.mark.process
def test_the_kernel_keeps_little_of_a_response_that_is_not_read(server: Live):
    with closing(small_window(server.port)) as client:
        client.sendall(LARGE * 10)
        time.sleep(1)
        os.kill(server.process.pid, signal.SIGSTOP)  # what comes now is in the kernel's buffers
        try:
            client.settimeout(1)
            received = 0
            with suppress(TimeoutError):
                while piece := client.recv(65536):
                    received += len(piece)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
    assert 10_000 < received < 400_000


def poll_of(client: socket.socket) -> select.poll:
    """Reports a reset."""
    found = select.poll()
    found.register(client, select.POLLHUP)
    return found


@pytest.mark.process
def test_the_number_of_clients_that_read_nothing_is_limited(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log") as server, ExitStack() as stack:
        before = rss(server)
        clients = [stack.enter_context(closing(small_window(server.port))) for _ in range(150)]
        for client in clients:
            client.sendall(LARGE * 10)
        until = time.monotonic() + 10
        while refused_connections(server).get("unread-response", 0) < 150 - 64:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert rss(server) - before < 40_000_000
        assert is_answered(server)
        # A closed connection leaves nothing in the kernel: the client is told at once, by a reset.
        told = [bool(poll_of(client).poll(0)) for client in clients]
        assert sum(told) >= 150 - 64


@contextmanager
def serving(size: int) -> Iterator[tuple[int, ConnectionLimits, list[str]]]:
    """uvicorn in a thread, whose every response has `size` bytes: port, table, reasons."""
    counted: list[str] = []
    limits = ConnectionLimits(1000, counted.append)

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            limits.start(asyncio.get_running_loop())
            bentoml_compat.use_protocol(server, limits, 100)
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        await receive()
        fields = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": bytes(size)})

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port, limits, counted
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_trickle_of_reads_keeps_no_connection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_protocol, "RESPONSE_SECONDS", 2.0)
    with serving(1_000_000) as (port, _, counted), closing(small_window(port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        started, received = time.monotonic(), 0
        with suppress(ConnectionError):
            while piece := client.recv(30_000):
                received += len(piece)
                time.sleep(0.01)
                assert time.monotonic() - started < 10
        assert counted == ["unread-response"]
        assert received < 50_000_000


def test_a_large_response_is_read_over_a_slow_line(monkeypatch: pytest.MonkeyPatch):
    """Behind all the time, and once for longer than a look at all connections."""
    monkeypatch.setattr(http_protocol, "WRITE_SECONDS", 1.5)
    with (
        serving(1_500_000) as (port, limits, counted),
        closing(small_window(port, 65_536)) as client,
    ):
        for _ in range(2):
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = 0
            while received < 1_500_000:
                received += len(client.recv(32_768))
                time.sleep(0.03)
        assert counted == []
        assert not limits._blocked


def test_the_bytes_that_wait_for_slow_clients_are_limited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection_limits, "MAX_UNREAD_BYTES", 5_000_000)
    with serving(2_000_000) as (port, _, counted), ExitStack() as stack:
        clients = []
        for _ in range(6):
            clients.append(stack.enter_context(closing(small_window(port, 65_536))))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.05)
        until = time.monotonic() + 5
        while len(counted) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        assert counted == ["unread-response"] * 4
        received = len(clients[-1].recv(65536))  # the latest is served
        while received < 2_000_000:
            received += len(clients[-1].recv(65536))


@pytest.mark.process
def test_requests_without_their_body_lock_nobody_out(folder: Path, tmp_path: Path):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with (
        live(folder, tmp_path / "log", FLEDGE_MAX_CONNECTIONS="32") as server,
        ExitStack() as stack,
    ):
        for _ in range(32):
            stack.enter_context(closing(connect(server))).sendall(head)
        time.sleep(2)  # a second, as a clock says that goes by half seconds
        data = photo(1)
        for _ in range(3):
            assert is_answered(server)
            with connect(server) as client:
                client.sendall(head.replace(b": 9", b": %d" % len(data)) + data)
                assert client.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.process
def test_unread_responses_lock_nobody_out(folder: Path, tmp_path: Path):
    with (
        live(folder, tmp_path / "log", FLEDGE_MAX_CONNECTIONS="32") as server,
        ExitStack() as stack,
    ):
        for _ in range(32):
            stack.enter_context(closing(small_window(server.port))).sendall(LARGE * 10)
        time.sleep(2)
        for _ in range(3):
            assert is_answered(server)


IN_ADVANCE = {
    "large heads": b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 60_000 + b"\r\n\r\n",
    "many fields": b"GET /x HTTP/1.1\r\nHost:a\r\n" + b"a:\r\n" * 98 + b"\r\n",
    "bodies": b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n"
    + b"a" * 60_000,
}


@pytest.mark.process
@pytest.mark.parametrize("kind", IN_ADVANCE)
def test_requests_in_advance_count_what_they_hold(folder: Path, tmp_path: Path, kind: str):
    most = 0
    with live(folder, tmp_path / "log") as server:
        assert is_answered(server)
        before = rss(server)

        def ask() -> None:
            with closing(connect(server)) as client, suppress(OSError):
                client.settimeout(8)
                client.sendall(IN_ADVANCE[kind] * 900)
                time.sleep(2)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, rss(server) - before)
            time.sleep(0.05)
        assert is_answered(server)
    assert most < 110_000_000


@pytest.mark.process
def test_many_images_in_advance_are_answered(server: Live):
    data = photo(1)
    raw = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    last = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(server) as client:
        sender = threading.Thread(target=client.sendall, args=((raw + data) * 300 + last,))
        sender.start()
        answer = b"".join(iter(lambda: client.recv(65536), b""))
        sender.join()
    assert answer.count(b"HTTP/1.1 200") == 301
