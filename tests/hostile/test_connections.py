"""Clients that send too much, too slowly, or nothing: each is bounded, and others are answered."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serving.server.connection_limits import connections_for
from tests.support.live_server import ROOT, Live, free_port, get, live, post
from tests.support.tiny_bundle import photo


def connect(server: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def rss(server: Live) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def is_answered(server: Live) -> bool:
    started = time.monotonic()
    with connect(server) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = client.recv(65536)
    return answer.startswith(b"HTTP/1.1 200") and time.monotonic() - started < 1


def send_all(client: socket.socket, first: bytes, piece: bytes, most: int) -> int:
    """Send `first`, then pieces until the service closes; returns the number of bytes sent."""
    sent = 0
    with suppress(ConnectionError):
        client.sendall(first)
        sent += len(first)
        while sent < most:
            client.sendall(piece)
            sent += len(piece)
    return sent


def response(client: socket.socket) -> bytes:
    with suppress(ConnectionError):
        return b"".join(iter(lambda: client.recv(65536), b""))
    return b""


def head(size: int, fields: int = 0) -> bytes:
    """A request of `size` bytes with `fields` more fields."""
    start = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
        b"X%d: 1\r\n" % number for number in range(fields)
    )
    return start + b"X-Long: " + b"a" * (size - len(start) - 12) + b"\r\n\r\n"


ENDLESS = {
    "headers": (b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n", b"A: b\r\n" * 10_000, 431),
    "a header's value": (b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nA: ", b"a" * 60_000, 431),
    "a header's name": (b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n", b"a" * 60_000, 431),
    "a URL": (b"GET /", b"a" * 60_000, 431),
    "empty lines": (b"", b"\r\n" * 30_000, 431),
    "folded lines": (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n", b" c\r\n" * 9000, 400),
    "trailers": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"A: b\r\n" * 10_000,
        431,
    ),
    "a trailer": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: ",
        b"a" * 60_000,
        400,
    ),
    "a chunk's extension": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;a=",
        b"a" * 60_000,
        400,
    ),
    "chunks of a byte": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n" * 10_000,
        400,
    ),
    "chunk extensions": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1;" + b"a" * 5000 + b"\r\nx\r\n",
        400,
    ),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_refused_after_a_few_bytes(server: Live, kind: str):
    first, piece, status = ENDLESS[kind]
    before = rss(server)
    with connect(server) as client:
        sent = send_all(client, first, piece, 30_000_000)
        answer = response(client)
    assert sent < 8_000_000  # most of it lies in the buffers of the kernel
    assert rss(server) - before < 8_000_000
    assert not answer or answer.startswith(b"HTTP/1.1 %d" % status)
    assert is_answered(server)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (head(65_536), 200),
        (head(65_537), 431),
        (head(70_000), 431),
        (head(4_000, 98), 200),
        (head(4_000, 99), 431),
    ],
)
def test_a_head_has_at_most_64_kb_and_100_fields(server: Live, raw: bytes, status: int):
    with connect(server) as client:
        client.sendall(raw)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    if status == 431:
        _, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["code"] == "head-too-large"


def test_a_large_head_that_arrives_in_pieces_is_answered(server: Live):
    raw = head(60_000)
    with connect(server) as client:
        for start in range(0, len(raw), 7000):
            client.sendall(raw[start : start + 7000])
            time.sleep(0.01)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_body_may_follow_a_large_head(server: Live):
    data = photo(1, (600, 600))
    raw = head(60_000).replace(b"GET /readyz", b"POST /predict")[:-2]
    with connect(server) as client:
        client.sendall(raw + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_small_chunks_are_answered(server: Live):
    data = photo(1)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\nX-Checksum: 1\r\n\r\n"
    fields = b"Host: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\n" + fields + chunks)
        answer = response(client)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(post(f"{server.url}/predict", data).content)


def test_pipelined_requests_are_answered_in_order(server: Live):
    paths = ["/readyz", "/nowhere", "/model", "/livez"] * 100
    raw = "".join(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n" for path in paths)
    last = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(server) as client:
        client.sendall(raw.encode() + last)
        answer = response(client)
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", answer)
    assert statuses == [b"200", b"404", b"200", b"200"] * 100 + [b"200"]


def test_too_many_requests_in_advance_take_little_memory(server: Live):
    before = rss(server)
    one = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(40):
            client = stack.enter_context(closing(connect(server)))
            client.settimeout(0.5)
            with suppress(OSError):
                client.sendall(one * 6000)
        assert is_answered(server)
        assert rss(server) - before < 100_000_000
    assert is_answered(server)


def test_a_refused_head_does_not_take_the_response_to_an_earlier_request(server: Live):
    data = photo(1, (1500, 1500))
    with connect(server) as client:
        first = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        client.sendall(first % len(data) + data + head(200_000))
        answer = response(client)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200"]
    assert b"connection: close" in answer


def test_the_limit_on_connections_makes_room_for_new_ones(folder: Path, tmp_path: Path):
    """Silent connections are closed, the longest silent first; a request in progress is not."""
    with (
        live(folder, tmp_path / "log", FLEDGE_MAX_CONNECTIONS="20") as server,
        ExitStack() as stack,
    ):
        data = photo(1)
        busy = stack.enter_context(closing(connect(server)))
        raw = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
        busy.sendall(raw + data[:100])
        for number in range(100):
            stack.enter_context(closing(connect(server)))
            assert number % 20 or is_answered(server)
        busy.sendall(data[100:])
        assert busy.recv(65536).startswith(b"HTTP/1.1 200")
        for _ in range(20):  # all with a request in progress; the first connection makes room
            client = stack.enter_context(closing(connect(server)))
            client.sendall(raw + data[:100])
            time.sleep(0.02)
        one_more = stack.enter_context(closing(connect(server)))
        assert response(one_more) == b""  # none of them has had a second for its body
        client.close()
        deadline = time.monotonic() + 5
        while not (metrics := refused_connections(server)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert metrics["connection-limit"] > 80
        warnings: list[str] = []
        while not warnings and time.monotonic() < deadline:
            time.sleep(0.1)
            lines = server.log.read_text().splitlines()
            warnings = [line for line in lines if "largest number of connections" in line]
        assert 1 <= len(warnings) <= 2  # at most one in ten seconds


def refused_connections(server: Live) -> dict[str, float]:
    try:
        text = get(f"{server.url}/metrics").text
    except OSError:
        return {}
    found = re.findall(r'fledge_connections_refused_total{reason="([a-z-]+)"} ([0-9.]+)', text)
    return {reason: float(value) for reason, value in found}


def test_a_trailer_is_no_field_of_the_request(folder: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    raw = (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\nx\r\n0\r\nAuthorization: Bearer secret\r\n\r\n"
    )
    options = {"FLEDGE_API_KEYS_FILE": str(keys)}
    with live(folder, tmp_path / "log", **options) as server, connect(server) as client:
        client.sendall(raw)
        assert client.recv(65536).startswith(b"HTTP/1.1 401")


def slow(
    server: Live, first: bytes, piece: bytes, pause: float, times: dict[str, float], name: str
):
    """Send a piece every few seconds until the service closes, and note when that was."""
    started = time.monotonic()
    with connect(server) as client, suppress(OSError):
        client.sendall(first)
        client.settimeout(pause)
        while time.monotonic() - started < 40:
            try:
                if not client.recv(65536):
                    break
            except TimeoutError:
                if piece:
                    client.sendall(piece)
    times[name] = time.monotonic() - started


SLOW = {
    # kind: first bytes, bytes that follow, seconds between them, least and largest time
    "silent": (b"", b"", 1, 9, 12),
    "half a head": (b"GET / HTTP/1.1\r\nHo", b"", 1, 9, 14),
    "a byte of a head a second": (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: ", b"a", 1, 9, 14),
    "an empty line a second": (b"\r\n", b"\r\n", 1, 9, 14),
    "a second head, slowly": (
        b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
        b"a",
        1,
        9,
        14,
    ),
    "no body": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"",
        1,
        14,
        19,
    ),
    "most of a body": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 19000000\r\n\r\n"
        + bytes(18_000_000),
        b"",
        1,
        14,
        36,
    ),
    "a byte of a body a second": (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"a",
        1,
        14,
        19,
    ),
    "a body to an unknown path": (
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"a",
        1,
        9,
        14,
    ),
    "an idle connection": (
        b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"", 1, 4, 8,
    ),
}  # fmt: skip


@pytest.mark.process
def test_slow_clients_are_disconnected_in_time(server: Live):
    times: dict[str, float] = {}
    threads = [
        threading.Thread(target=slow, args=(server, first, piece, pause, times, name))
        for name, (first, piece, pause, _, _) in SLOW.items()
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert is_answered(server)
        time.sleep(0.5)
    wrong = {
        name: times[name]
        for name, (_, _, _, least, most) in SLOW.items()
        if not least <= times[name] <= most
    }
    assert wrong == {}


@pytest.mark.process
def test_an_endless_body_to_an_unknown_path_is_cut_off(server: Live):
    started = time.monotonic()
    first = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server) as client:
        sent = send_all(client, first, b"10000\r\n" + bytes(65536) + b"\r\n", 2_000_000_000)
    assert sent < 100_000_000
    assert time.monotonic() - started < 20


@pytest.mark.process
def test_a_client_that_reads_nothing_is_disconnected(server: Live):
    large = b"GET /static_content/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before, counted = rss(server), refused_connections(server).get("unread-response", 0)
    with ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(large * 10)
        until = time.monotonic() + 45
        while refused_connections(server).get("unread-response", 0) < counted + 20:
            assert time.monotonic() < until
            assert rss(server) - before < 60_000_000
            time.sleep(1)
    assert is_answered(server)


@pytest.mark.process
def test_silent_connections_beyond_the_descriptors_stop_nobody(folder: Path, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1400, hard))
    try:
        with (
            live(
                folder, tmp_path / "log", new_interpreter=True, FLEDGE_MAX_CONNECTIONS="600"
            ) as server,
            ExitStack() as stack,
        ):
            for number in range(1100):
                stack.enter_context(closing(connect(server)))
                if number % 50 == 0:
                    assert is_answered(server)
            assert refused_connections(server)["connection-limit"] >= 500
            assert psutil.Process(server.process.pid).num_fds() < 700
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.process
def test_two_workers_have_the_same_limits(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log", FLEDGE_WORKERS="2") as server:
        for first, piece, _ in ENDLESS.values():
            with connect(server) as client:
                assert send_all(client, first, piece, 30_000_000) < 8_000_000
        assert is_answered(server)


@pytest.mark.process
def test_bentoml_serve_has_the_same_limits(folder: Path, tmp_path: Path):
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:ImageClassifier"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--working-dir", str(ROOT)]
    env = {"FLEDGE_BUNDLE": str(folder), "BENTOML_HOME": str(tmp_path / "home")}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        server = Live(f"http://127.0.0.1:{port}", port, process, log)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(OSError, httpx.TransportError):
                if is_answered(server):
                    break
            time.sleep(0.1)
        for first, piece, _ in ENDLESS.values():
            with connect(server) as client:
                assert send_all(client, first, piece, 30_000_000) < 8_000_000
        with connect(server) as client:
            client.sendall(b"GET /readyz HTTP/1.1\r\nSec-WebSocket-Extensions: \xff\r\n")
            client.sendall(UPGRADE + b"websocket\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        with connect(server) as client:
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 400")
        assert is_answered(server)
    finally:
        process.terminate()
        process.wait(30)


UPGRADE = b"Host: localhost\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
UPGRADE += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nUpgrade: "


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /x HTTP/1.1\r\n" + UPGRADE + b"websocket\r\n\r\n", 404),
        (b"GET /readyz HTTP/1.1\r\n" + UPGRADE + b"h2c\r\n\r\n", 200),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
def test_other_protocols_are_not_spoken(server: Live, raw: bytes, status: int):
    with connect(server) as client:
        client.sendall(raw)
        assert client.recv(65536).startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
@pytest.mark.parametrize("framing", [b"", b"Transfer-Encoding: chunked\r\n"])
def test_an_upgrade_with_an_endless_body_is_cut_off(server: Live, protocol: bytes, framing: bytes):
    raw = b"POST /predict HTTP/1.1\r\n" + framing + UPGRADE + protocol + b"\r\n\r\n"
    before = rss(server)
    with connect(server) as client:
        sent = send_all(client, raw, b"10000\r\n" + bytes(65536) + b"\r\n", 200_000_000)
    assert sent < 110_000_000  # what `/predict` accepts and drops, and buffers of the kernel
    assert rss(server) - before < 30_000_000
    assert is_answered(server)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("descriptors", "wanted", "connections"),
    [(1024, 4096, 768), (1024, 100, 100), (65_536, 4096, 4096), (65_536, 100_000, 61_440)],
)
def test_descriptors_are_left_for_files(descriptors: int, wanted: int, connections: int):
    found, backlog = connections_for(descriptors, wanted)
    assert found == connections
    assert backlog <= (descriptors - connections) // 2


@pytest.mark.parametrize("descriptors", [20, 64, 256])
def test_few_descriptors_still_allow_connections(descriptors: int):
    connections, backlog = connections_for(descriptors, 4096)
    assert 16 <= connections <= max(16, descriptors - 64)
    assert backlog >= 16
