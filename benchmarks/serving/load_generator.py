"""Closed-loop HTTP load: concurrent callers on persistent connections, latencies, answers.

The callers share the cores with the measured server, so they must be cheap: one event loop, raw
sockets without a client library, requests that are built beforehand.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import httptools

if TYPE_CHECKING:
    from benchmarks.serving.processes import Meter

SAMPLE_INTERVAL: Final = 0.25
"""Seconds between two samples of the server's memory."""
DRAIN_TIMEOUT: Final = 20.0
"""Seconds to wait for open requests after the measured window, and for the first answer."""
LEAST_ANSWERS: Final = 4
"""Answers per caller that a measured window must have, or else it is extended."""
MOST_PERIODS: Final = 8
"""How often as long as asked for a window becomes at most."""
_RECONNECT_DELAY: Final = 0.05


class Answer(NamedTuple):
    """An answer. at: when its last byte arrived. seconds: since its request was written."""

    at: float
    seconds: float
    photo: int
    status: int
    body: bytes


@dataclass(frozen=True)
class Window:
    """Answers in the measured window.

    seconds: Its length. answers: Those whose last byte arrived within it. lost: Requests without an
    answer: failed or broken connections, and requests still open after `DRAIN_TIMEOUT`. own_cpu:
    CPU seconds of the callers themselves.
    """

    seconds: float
    answers: list[Answer]
    lost: int
    own_cpu: float


class Load:
    """Callers of one server. Each sends its next request as soon as it has its answer."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        """`requests`: complete HTTP/1.1 requests, sent in turn; `Answer.photo` is the index."""
        self._port = port
        self._requests = requests
        self._sent = 0
        self._ended = False
        self._first = asyncio.Event()
        self._answers: list[Answer] = []
        self._lost: list[float] = []

    async def run(self, callers: int, warm: float, seconds: float, meter: Meter) -> Window:
        """Send load until the first answer, for `warm` seconds, then for `seconds` measured ones.

        There is no pause in between. A request that is open at either end of the window counts if
        its answer arrives within, so that neither slow nor fast servers gain at the ends. While
        there are too few answers, as of servers that answer in large batches, the window is
        extended by `seconds`.
        """
        tasks = [asyncio.create_task(self._call()) for _ in range(callers)]
        with suppress(TimeoutError):
            await asyncio.wait_for(self._first.wait(), DRAIN_TIMEOUT)
        await asyncio.sleep(warm)
        meter.start()
        own_cpu, begun = time.process_time(), time.perf_counter()
        before = len(self._answers)
        for period in range(1, MOST_PERIODS + 1):
            while (left := begun + period * seconds - time.perf_counter()) > 0:
                await asyncio.sleep(min(left, SAMPLE_INTERVAL))
                meter.sample()
            if len(self._answers) - before >= LEAST_ANSWERS * callers:
                break
        ended = time.perf_counter()
        own_cpu = time.process_time() - own_cpu
        meter.stop()
        self._ended = True
        _, unanswered = await asyncio.wait(tasks, timeout=DRAIN_TIMEOUT)
        for task in unanswered:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        answers = [answer for answer in self._answers if begun <= answer.at <= ended]
        lost = sum(begun <= at <= ended for at in self._lost) + len(unanswered)
        return Window(ended - begun, answers, lost, own_cpu)

    def next(self) -> tuple[int, bytes] | None:
        """The next photo and its request; None after the end of the window."""
        if self._ended:
            return None
        photo = self._sent % len(self._requests)
        self._sent += 1
        return photo, self._requests[photo]

    def add_answer(self, answer: Answer) -> None:
        """Record an answer."""
        self._first.set()
        self._answers.append(answer)

    def add_lost(self) -> None:
        """Record a request that got no answer."""
        self._lost.append(time.perf_counter())

    async def _call(self) -> None:
        """One caller; reconnects when its connection closes."""
        loop = asyncio.get_running_loop()
        while not self._ended:
            try:
                transport, connection = await loop.create_connection(
                    lambda: _Connection(self), "127.0.0.1", self._port
                )
            except OSError:
                self.add_lost()
                await asyncio.sleep(_RECONNECT_DELAY)
                continue
            try:
                await connection.closed
            finally:
                transport.abort()


class _Connection(asyncio.Protocol):
    """One connection: sends a request, reads its answer, sends the next."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._waiting = False
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._send_next()

    def _send_next(self) -> None:
        following = self._load.next()
        if following is None:
            self._transport.close()
            return
        self._photo, request = following
        self._body: list[bytes] = []
        self._waiting = True
        self._started = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_body(self, chunk: bytes) -> None:
        self._body.append(chunk)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._waiting = False
        self._load.add_answer(
            Answer(
                now,
                now - self._started,
                self._photo,
                self._parser.get_status_code(),
                b"".join(self._body),
            )
        )
        if self._parser.should_keep_alive():
            self._send_next()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting:
            self._load.add_lost()
        if not self.closed.done():
            self.closed.set_result(None)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; nan without values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
