"""Offers of other protocols are ignored: the request is answered, and its body is its own."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.live_server import Live, live
from tests.support.tiny_bundle import photo

HOST = b"Host: localhost\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
WEBSOCKET += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
POISON = WEBSOCKET + b"Sec-WebSocket-Extensions: \xff\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAA\r\n"
OFFERS = {
    "none": b"",
    "h2c": H2C,
    "WebSocket": WEBSOCKET,
    "bad WebSocket": POISON,
    "unknown": b"connection: close, upgrade\r\nUPGRADE: x\r\nUpgrade: \r\n",
    "without Connection": b"Upgrade: h2c\r\n",
}


def connect(server: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def exchange(server: Live, *pieces: bytes) -> bytes:
    """Send pieces, each in a packet of its own, and read until the end or 0.5 s of silence."""
    with connect(server) as client, suppress(ConnectionError, TimeoutError):
        answer = b""
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.05)
        client.settimeout(0.5)
        while data := client.recv(65536):
            answer += data
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(one) for one in re.findall(rb"HTTP/1.1 (\d+)", answer)]


def post(fields: bytes, body: bytes) -> tuple[bytes, bytes]:
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    return b"POST /predict HTTP/1.1\r\n" + HOST + fields + length, body


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("split", [False, True])
def test_a_photo_that_comes_with_an_offer_is_classified(server: Live, offer: str, split: bool):
    pieces = post(OFFERS[offer], photo(1))
    answer = exchange(server, *(pieces if split else [b"".join(pieces)]))
    assert statuses(answer) == [200]
    assert b'"label"' in answer


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("split", [False, True])
def test_a_body_is_not_taken_for_a_request(server: Live, offer: str, split: bool):
    pieces = post(OFFERS[offer], b"GET /model HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = exchange(server, *(pieces if split else [b"".join(pieces)]))
    assert statuses(answer) == [415]  # no image


@pytest.mark.parametrize("offer", OFFERS)
def test_a_chunked_body_with_an_offer_is_read(server: Live, offer: str):
    data = photo(2)
    head = b"POST /predict HTTP/1.1\r\n" + HOST + OFFERS[offer] + b"Transfer-Encoding: chunked\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    assert statuses(exchange(server, head + b"\r\n", body[:100], body[100:])) == [200]
    assert "Traceback" not in server.log.read_text(errors="replace")


def test_offers_in_pipelined_requests_are_ignored_one_by_one(server: Live):
    photo_with_offer = b"".join(post(H2C, photo(1)))
    page = b"GET /readyz HTTP/1.1\r\n" + HOST + POISON + b"\r\n"
    last = b"GET /readyz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    answer = exchange(server, photo_with_offer + 20 * page + photo_with_offer + last)
    assert statuses(answer) == [200] * 23


def test_a_head_with_an_offer_has_the_same_limits(server: Live):
    many = b"".join(b"X%d: 1\r\n" % number for number in range(98))
    raw = b"GET /readyz HTTP/1.1\r\n" + HOST + H2C + many + b"\r\n"
    assert statuses(exchange(server, raw)) == [431]
    folded = b"GET /readyz HTTP/1.1\r\n" + HOST + H2C + b"A: b\r\n Upgrade: x\r\n\r\n"
    assert statuses(exchange(server, folded)) == [400]


@pytest.mark.parametrize("target", [b"localhost:80", b"/predict", b"a"])
def test_connect_is_refused_and_what_follows_is_no_request(server: Live, target: bytes):
    raw = b"CONNECT " + target + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n"
    answer = exchange(server, raw, b"GET /model HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert statuses(answer) == [400]
    assert b"CONNECT is not supported" in answer


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl_with_http2_gets_its_answer(server: Live, tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(photo(3))
    for body in (["--data-binary", "@photo.jpg"], ["-F", "image=@photo.jpg"], ["-T", "photo.jpg"]):
        command = ["curl", "-sS", "-m", "10", "--http2", "-X", "POST", *body, "-w", " %{http_code}"]
        done = subprocess.run(
            [*command, server.url + "/predict"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.endswith(" 200"), done


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_websocket_offers_leave_nothing_and_the_stop_is_graceful(
    folder: Path, tmp_path: Path, workers: int
):
    with live(folder, tmp_path / "log", FLEDGE_WORKERS=str(workers)) as server:
        raw = b"GET / HTTP/1.1\r\n" + HOST + POISON + b"\r\n"
        for _ in range(20):
            with connect(server) as client:
                client.sendall(raw)
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text(errors="replace")
