"""Clients that close their connection while their request is answered: the work ends at once."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.hostile.images import progressive_jpeg
from tests.support.live_server import Live, client, get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

SECONDS = progressive_jpeg(7000, 7000, scans=94)  # decoding it takes 3 s or more
HONEST = photo(1)
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("disconnects")
    env = {"FLEDGE_MAX_MEMORY": str(1400 * 2**20), "FLEDGE_DEADLINE": "30"}
    with live(tiny_bundle(folder / "bundle"), folder / "log", **env) as running:
        for _ in range(5):
            assert post(f"{running.url}/predict", HONEST).status_code == 200
        yield running


def request(body: bytes, path: str = "/predict", fields: bytes = b"") -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n"
    return head % (path.encode(), fields, len(body)) + body


def form(images: list[bytes]) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%b\r\n'
    body = b"".join(part % image for image in images) + b"--b--\r\n"
    fields = b"Content-Type: multipart/form-data; boundary=b\r\n"
    return request(body, "/predict/batch", fields)


def connect(server: Live, raw: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(raw)
    return connection


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def metric(server: Live, name: str) -> float:
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", get(f"{server.url}/metrics").text, re.M)
    assert found, name
    return float(found[1])


def decoders(server: Live) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in children if "serving.imaging.decoder_process" in one.cmdline()]


def busy(server: Live) -> list[psutil.Process]:
    """Decoder processes that have used the processor in the last 0.1 s."""

    def used() -> dict[psutil.Process, float]:
        seconds = {}
        for one in decoders(server):
            try:
                seconds[one] = sum(one.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return seconds

    before = used()
    time.sleep(0.1)
    return [one for one, seconds in used().items() if seconds > before.get(one, 0.0)]


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until a condition holds; returns the seconds that it took, or fails."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.01)
    return time.monotonic() - start


def wait_for_work(server: Live) -> None:
    wait(lambda: bool(decoders(server)) and bool(busy(server)), 10)
    assert metric(server, "fledge_images_waiting") > 0


def assert_idle(server: Live, seconds: float = 1.0) -> None:
    wait(lambda: metric(server, "fledge_images_waiting") == 0 and not busy(server), seconds + 0.3)


REQUESTS = {
    "an image": request(SECONDS),
    "an image and 300 KB behind it": request(SECONDS + bytes(300_000)),
    "a batch": form([SECONDS] * 3),
    "a pipelined request behind it": request(SECONDS) * 2,
    "chunks": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(SECONDS), SECONDS),
}


@pytest.mark.parametrize("close", [socket.socket.close, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_work_ends_within_a_second_after_the_client_has_gone(
    server: Live, kind: str, close: Callable[[socket.socket], None]
) -> None:
    before = len(server.log.read_text())
    connection = connect(server, REQUESTS[kind])
    wait_for_work(server)
    close(connection)
    assert_idle(server)
    assert post(f"{server.url}/predict", HONEST).status_code == 200
    log = server.log.read_text()[before:]
    assert "Traceback" not in log
    assert "Exception in ASGI" not in log
    assert "failed" not in log


def test_fifty_clients_in_a_row_leave_no_process_and_no_memory(server: Live) -> None:
    body = SECONDS + bytes(5_000_000)
    service = psutil.Process(server.process.pid)

    def attack(times: int) -> None:
        for _ in range(times):
            connection = connect(server, request(body))
            time.sleep(0.05)
            connection.close()
        assert_idle(server, 3)

    attack(10)
    memory, threads, files = service.memory_info().rss, service.num_threads(), service.num_fds()
    attack(50)
    assert len(decoders(server)) <= psutil.cpu_count()
    assert service.memory_info().rss < memory + 30 * 2**20
    assert service.num_threads() <= threads + 2
    assert service.num_fds() <= files + 4
    # All bytes of the budget for bodies are free again: it holds a large body.
    assert post(f"{server.url}/predict", HONEST + bytes(19_000_000)).status_code == 200


def test_others_on_the_machine_are_answered_meanwhile(server: Live) -> None:
    with client(server.url) as honest:
        for _ in range(10):
            connection = connect(server, request(SECONDS))
            start = time.monotonic()
            assert honest.post("/predict", content=HONEST).status_code == 200
            assert time.monotonic() - start < 1
            connection.close()
    assert_idle(server, 3)


def test_a_form_that_is_parsed_in_a_thread_does_not_fail_when_the_client_goes(
    server: Live,
) -> None:
    before = len(server.log.read_text())
    fields = b"Content-Type: multipart/form-data; boundary=b\r\n"
    for _ in range(5):
        connection = connect(server, request(b"\r\n--" * 1_000_000, "/predict", fields))
        time.sleep(0.02)
        connection.close()
    assert_idle(server, 3)
    assert post(f"{server.url}/predict", HONEST).status_code == 200
    assert "Traceback" not in server.log.read_text()[before:]


def test_pipelined_and_kept_connections_are_answered(server: Live) -> None:
    with client(server.url) as kept:
        for size in (10, 400_000):
            answers = [kept.post("/predict", content=HONEST + bytes(size)) for _ in range(3)]
            assert {answer.status_code for answer in answers} == {200}
    raw = request(HONEST) * 3 + request(HONEST + bytes(200_000)) * 3
    last = request(HONEST, fields=b"Connection: close\r\n")
    with connect(server, raw + last) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 200 OK") == 7


def test_shutdown_waits_for_honest_clients_alone(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_DEADLINE="30") as server:
        gone = connect(server, request(SECONDS))
        wait_for_work(server)
        gone.close()
        assert_idle(server)
        slow = request(progressive_jpeg(4000, 4000, scans=10))
        with connect(server, slow) as honest:
            wait_for_work(server)
            start = time.monotonic()
            assert server.stop() == 0
            assert honest.recv(65536).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - start < 10
        assert "Traceback" not in server.log.read_text()


def test_who_closes_the_connection_is_in_the_log(server: Live):
    fields = b"X-Request-ID: hung-up\r\n"
    connection = connect(server, request(SECONDS, fields=fields))
    time.sleep(0.5)
    reset(connection)
    half = connect(server, request(HONEST, fields=b"X-Request-ID: half-a-body\r\n")[:-10])
    time.sleep(0.2)
    half.close()
    until = time.monotonic() + 10
    lines: list[str] = []
    while len(lines) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        lines = [line for line in server.log.read_text().splitlines() if '"status": 499' in line]
        lines = [line for line in lines if "hung-up" in line or "half-a-body" in line]
    found = {one["request"]: one for one in map(json.loads, lines)}
    assert set(found) == {"hung-up", "half-a-body"}
    assert {one["client"] for one in found.values()} == {"127.0.0.1"}
    assert {one["code"] for one in found.values()} == {"closed-by-caller"}
    taken = [line for line in server.log.read_text().splitlines() if "request hung-up" in line]
    assert "request hung-up from 127.0.0.1: 7000 x 7000 pixels" in taken[0]
