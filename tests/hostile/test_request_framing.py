"""Bodies in small chunks, lengths of many digits, and what is not HTTP, behind honest requests."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import psutil
import pytest

from serving.server.connection_limits import FRAMING_BYTES
from tests.support.live_server import NO_TLS, Live, get
from tests.support.tiny_bundle import photo

HOST = b"Host: localhost\r\n"
CHUNKED = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
PAGE = b"GET /readyz HTTP/1.1\r\n" + HOST + b"\r\n"


def connect(server: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def exchange(server: Live, raw: bytes) -> bytes:
    """Send bytes and read until the service closes."""
    answer = b""
    with connect(server) as client, suppress(ConnectionError):
        client.sendall(raw)
        while data := client.recv(65536):
            answer += data
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(one) for one in re.findall(rb"HTTP/1.1 (\d+)", answer)]


def refused(server: Live, reason: str) -> float:
    text = get(f"{server.url}/metrics").text
    found = re.search(rf'fledge_connections_refused_total{{.*"{reason}".*}} (\S+)', text)
    return float(found.group(1)) if found else 0.0


def cpu_seconds(server: Live) -> float:
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def test_many_connections_with_chunks_of_a_byte_cost_little(server: Live):
    raw = CHUNKED + b"1\r\nx\r\n" * 200_000
    before, count = cpu_seconds(server), refused(server, "body-framing")
    for _ in range(20):
        with connect(server) as client, suppress(ConnectionError):
            client.sendall(raw)
    assert get(f"{server.url}/readyz").status_code == 200
    assert refused(server, "body-framing") - count == 20
    assert cpu_seconds(server) - before < 2  # 20 ms each; all their chunks: 0.2 s each


def test_who_sends_chunks_of_a_byte_is_told(server: Live):
    with connect(server) as client:
        client.sendall(CHUNKED + b"1\r\nx\r\n" * (FRAMING_BYTES // 5 + 15_000))
        answer = client.recv(65536)
    assert statuses(answer) == [400]
    assert b"chunks of the body are too small" in answer


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("size", [24, 76, 1000, 1024, 4096, 8192, 16384, 65536])
def test_usual_chunks_are_accepted(server: Live, size: int):
    data = photo(1, (900, 900)) if size < 1000 else photo(1, (2400, 2400))
    answer = httpx.post(
        f"{server.url}/predict", content=pieces(data, size), timeout=60, verify=NO_TLS
    )
    assert answer.status_code == 200, answer.text


def test_a_small_photo_in_chunks_of_a_byte_is_accepted(server: Live):
    data = photo(1, (64, 64))
    assert len(data) < 10_000
    answer = httpx.post(f"{server.url}/predict", content=pieces(data, 1), verify=NO_TLS, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl_may_send_from_a_pipe(server: Live):
    command = ["curl", "-sS", "-m", "20", "-X", "POST", "-T", "-", "-w", " %{http_code}"]
    data = photo(1, (2400, 2400))
    done = subprocess.run([*command, f"{server.url}/predict"], input=data, capture_output=True)
    assert done.stdout.endswith(b" 200"), done


@pytest.mark.parametrize("zeros", [20, 4300, 6000, 60_000])
def test_a_length_of_many_digits_is_a_bad_request(server: Live, zeros: int):
    head = b"POST /predict HTTP/1.1\r\nConnection: close\r\n" + HOST
    answer = exchange(server, head + b"Content-Length: " + b"0" * zeros + b"3\r\n\r\nabc")
    assert statuses(answer) == [400]
    assert b"Content-Length has more than 20 digits" in answer
    assert "Traceback" not in server.log.read_text()


def test_a_length_may_begin_with_zeros(server: Live):
    data = photo(1)
    head = b"POST /predict HTTP/1.1\r\nConnection: close\r\n" + HOST
    answer = exchange(server, head + b"Content-Length: %020d\r\n\r\n" % len(data) + data)
    assert statuses(answer) == [200]


GARBAGE = {
    "no HTTP": b"\x16\x03\x01 garbage\r\n\r\n",
    "a bad field": b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n",
    "a bad URL": b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tunnel": b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a bad chunk": CHUNKED + b"zz\r\n",
    "a bad length": b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 1x\r\n\r\n",
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("before", [0, 1, 2, 20])
def test_requests_before_garbage_get_their_answers(server: Live, kind: str, before: int):
    answer = exchange(server, PAGE * before + GARBAGE[kind])
    assert statuses(answer) == ([200] * before or [400])
    if not before:
        _, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["code"] == "bad-request"
    assert "Traceback" not in server.log.read_text(errors="replace")


def test_a_photo_before_garbage_is_classified(server: Live):
    data = photo(1)
    head = b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(data)
    answer = exchange(server, head + data + GARBAGE["no HTTP"] + PAGE)
    assert statuses(answer) == [200]
    assert b'"label"' in answer


def test_garbage_is_counted_and_logged_now_and_then(server: Live):
    count, size = refused(server, "invalid"), server.log.stat().st_size
    for _ in range(300):
        assert statuses(exchange(server, GARBAGE["no HTTP"])) == [400]
    assert refused(server, "invalid") - count == 300
    time.sleep(0.2)
    assert server.log.stat().st_size - size < 2000
