"""`benchmarks.serving`: the load generator against a real server, tables, requests."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop

from benchmarks.serving.load_generator import LEAST_ANSWERS, Load, Window, percentile
from benchmarks.serving.measurement import Row
from benchmarks.serving.photos import choose, requests
from benchmarks.serving.processes import Meter
from benchmarks.serving.tables import Results, markdown, ratio
from serving.http import forms
from tests.support.tiny_bundle import photo

PHOTOS = 5
DELAY = 0.02


@dataclass
class Echo:
    """Returns the body of each request after `delay` seconds, and counts."""

    closes: bool = False
    breaks_every: int = 0
    status: int = 200
    delay: float = DELAY
    connections: int = 0
    requests: int = 0
    open: int = 0
    most_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self.answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await reader.readexactly(int(head.partition("content-length: ")[2].split("\r")[0]))
        self.requests += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self.delay)
        self.open -= 1
        if self.breaks_every and self.requests % self.breaks_every == 0:
            return False
        last = "connection: close\r\n" if self.closes else ""
        status = f"HTTP/1.1 {self.status} OK\r\n{last}content-length: {len(body)}\r\n\r\n"
        writer.write(status.encode())
        await writer.drain()  # head and body in two writes
        writer.write(body)
        await writer.drain()
        return not self.closes


def measure(echo: Echo, callers: int) -> Window:
    async def serve_and_load() -> Window:
        server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        head = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 7\r\n\r\n"
        load = Load(port, [head + b"photo-%d" % number for number in range(PHOTOS)])
        async with server:
            return await load.run(callers, 0.1, 0.4, Meter(os.getpid()))

    return uvloop.run(serve_and_load())


def test_each_caller_sends_its_requests_sequentially_on_one_connection() -> None:
    echo = Echo()
    window = measure(echo, 4)
    assert echo.connections == echo.most_open == 4
    assert window.lost == 0
    assert {answer.body for answer in window.answers} == {b"photo-%d" % n for n in range(PHOTOS)}
    assert all(answer.body == b"photo-%d" % answer.photo for answer in window.answers)
    # Answers during the warm-up and after the end of the window are not counted.
    assert 0 < len(window.answers) < echo.requests - 4
    # Little's law: callers = rate x latency.
    seconds = [answer.seconds for answer in window.answers]
    assert min(seconds) >= 0.9 * DELAY  # timers have a resolution of 1 ms
    assert sum(seconds) / window.seconds == pytest.approx(4, rel=0.25)


def test_a_caller_reconnects_when_the_server_closes_the_connection() -> None:
    echo = Echo(closes=True)
    window = measure(echo, 2)
    assert window.lost == 0
    assert len(window.answers) > 4
    assert echo.connections >= echo.requests


def test_a_window_with_too_few_answers_is_extended() -> None:
    window = measure(Echo(delay=0.25), 2)
    assert len(window.answers) >= LEAST_ANSWERS * 2
    assert window.seconds > 0.9
    assert len(window.answers) / window.seconds == pytest.approx(2 / 0.25, rel=0.25)


def test_requests_without_an_answer_are_counted_as_lost() -> None:
    echo = Echo(breaks_every=3)
    window = measure(echo, 2)
    broken = echo.requests // 3
    assert broken / 2 < window.lost <= broken  # the others broke outside the window


def test_answers_have_the_status_that_the_server_sent() -> None:
    assert {answer.status for answer in measure(Echo(status=503), 2).answers} == {503}


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert percentile([7.0], 0.01) == percentile([7.0], 0.99) == 7


def test_tables_show_the_fastest_setting_and_ratios_within_a_round() -> None:
    def row(peer: str, setting: str, number: int, rps: float) -> Row:
        return Row(peer, setting, number, 16, 100, rps=rps, p50=1, p99=2, cpu=3, own_cpu=0.1)

    rates = (90, 60, 300)
    ours = [row("fledge-fp32", "default", n, rps) for n, rps in enumerate(rates)]
    slow = [row("onnx", "slow", n, rps) for n, rps in enumerate((20, 20, 500))]
    fast = [row("onnx", "fast", n, rps) for n, rps in enumerate((30, 30, 60))]
    results = Results([*ours, *slow, *fast])
    assert results.fastest("onnx") == "fast"
    text = ratio(results, "fledge-fp32", "onnx", 16, lambda r: r.rps)
    assert text == "3.00 (2.00 to 5.00)"
    page = markdown(results.rows, "int8")
    assert f"| FastAPI + ONNX Runtime, fp32 | {text} |" in page
    assert "slow: 20; **fast: 30**" in page


def test_request_bodies_are_the_bytes_of_the_photos(tmp_path: Path) -> None:
    for number in range(60):
        data = photo(number)
        (tmp_path / f"{number:02}.jpg").write_bytes(data + bytes(40_000 - len(data)))
    (tmp_path / "small.jpg").write_bytes(photo(0))
    photos = choose(tmp_path)
    assert photos == sorted(set(photos))
    assert len(photos) == 50
    assert photos == choose(tmp_path)
    contents = [path.read_bytes() for path in photos]
    raw = requests(photos, 3000, "/predict", None)
    assert [request.partition(b"\r\n\r\n")[2] for request in raw] == contents
    for request, content in zip(requests(photos, 3000, "/predict", "image"), contents, strict=True):
        head, _, body = request.partition(b"\r\n\r\n")
        media = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Type: "))
        assert forms.parse(body, media.removeprefix(b"Content-Type: ")).images == (content,)
