"""Uploads that are kept slow to fill the memory for bodies: others are answered all the same."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from serving.http.body_budget import SLOW_SECONDS
from tests.support.live_server import Live, get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

HONEST = photo(1)
LENGTH = 2**20 - 1
UPLOADS = 80  # more than fit
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("uploads")
    env = {"FLEDGE_MAX_MEMORY": str(400 * 2**20)}
    with live(tiny_bundle(folder / "bundle"), folder / "log", **env) as running:
        assert post(f"{running.url}/predict", HONEST).status_code == 200
        yield running


class SlowUploads:
    """Uploads of 1 MB less a byte that send all but the end at once, and then keep to the rules."""

    def __init__(self, server: Live) -> None:
        self.server, self.stop = server, threading.Event()
        self.sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._drip)

    def __enter__(self) -> SlowUploads:
        for _ in range(UPLOADS):
            self.sockets.append(self.open())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()
        for one in self.sockets:
            one.close()

    def open(self) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self.server.port), timeout=20)
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        with suppress(OSError):
            one.sendall(head % LENGTH + bytes(LENGTH - 100_000))
        return one

    def _drip(self) -> None:
        while not self.stop.wait(1):
            for number, one in enumerate(self.sockets):
                try:
                    one.sendall(bytes(1100))
                except OSError:  # ended: another in its place
                    one.close()
                    self.sockets[number] = self.open()

    def statuses(self) -> list[bytes]:
        """Status of each upload that has got an answer."""
        found = []
        for one in self.sockets:
            one.settimeout(0.0)
            with suppress(OSError):
                found.append(one.recv(65536)[:12])
            one.settimeout(20)
        return found


def test_slow_uploads_are_ended_when_others_need_the_memory(server: Live) -> None:
    with SlowUploads(server) as slow:
        time.sleep(SLOW_SECONDS + 1)
        answers = []
        for _ in range(20):
            start = time.monotonic()
            answers.append(post(f"{server.url}/predict", HONEST + bytes(900_000)).status_code)
            assert time.monotonic() - start < 1
        large = post(f"{server.url}/predict", HONEST + bytes(4_000_000)).status_code
        ended = slow.statuses()
    assert answers == [200] * 20
    assert large == 200
    assert b"HTTP/1.1 408" in ended
    assert set(ended) <= {b"HTTP/1.1 408", b"HTTP/1.1 429"}
    assert get(f"{server.url}/readyz").status_code == 200


def test_a_slow_upload_is_answered_where_nobody_needs_its_memory(server: Live) -> None:
    time.sleep(1)
    data = HONEST + bytes(50_000)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head % len(data) + data[:20_000])
        for start in range(20_000, len(data), 5000):
            time.sleep((SLOW_SECONDS + 2) / 10)
            connection.sendall(data[start : start + 5000])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
