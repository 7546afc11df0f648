"""Callers that ask over and over on connections that stay open, and what they were answered.

One event loop, sockets without a client library, requests that were built before: the callers
stand on the cores of the server that they measure, so they have to be light.
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

LOOK: Final = 0.25
"""Seconds between two looks at the server's memory."""
PATIENCE: Final = 20.0
"""Seconds that an answer may still take when the time is over."""
_PAUSE: Final = 0.05


class Answer(NamedTuple):
    """at: the moment at which its last byte came; seconds: since its request was written."""

    at: float
    seconds: float
    photo: int
    status: int
    body: bytes


@dataclass(frozen=True)
class Window:
    """What came while it was measured.

    seconds: how long that was. answers: whose last byte came within. lost: requests without an
    answer: connections that broke or could not be had, and what was still unanswered long after.
    own_cpu: seconds of the processor that the callers themselves took.
    """

    seconds: float
    answers: list[Answer]
    lost: int
    own_cpu: float


class Load:
    """Callers of one server. Each asks for the next photo as soon as it has its answer."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        """`requests`: whole HTTP/1.1 requests, sent in turn; a photo is the index of its own."""
        self._port = port
        self._requests = requests
        self._asked = 0
        self._over = False
        self._first = asyncio.Event()
        self._answers: list[Answer] = []
        self._lost: list[float] = []

    async def run(self, callers: int, warm: float, seconds: float, meter: Meter) -> Window:
        """Ask until there is an answer, `warm` seconds more, and then for `seconds` that count.

        There is no gap between them. What is on its way at either end belongs to the moment at
        which it is answered, so neither end favours slow servers or fast ones.
        """
        tasks = [asyncio.create_task(self._call()) for _ in range(callers)]
        with suppress(TimeoutError):
            await asyncio.wait_for(self._first.wait(), PATIENCE)
        await asyncio.sleep(warm)
        meter.start()
        own, begun = time.process_time(), time.perf_counter()
        while (left := begun + seconds - time.perf_counter()) > 0:
            await asyncio.sleep(min(left, LOOK))
            meter.look()
        ended = time.perf_counter()
        own = time.process_time() - own
        meter.stop()
        self._over = True
        _, stuck = await asyncio.wait(tasks, timeout=PATIENCE)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        answers = [answer for answer in self._answers if begun <= answer.at <= ended]
        lost = sum(begun <= at <= ended for at in self._lost) + len(stuck)
        return Window(ended - begun, answers, lost, own)

    def next(self) -> tuple[int, bytes] | None:
        """The next photo and its request; None when the time is over."""
        if self._over:
            return None
        photo = self._asked % len(self._requests)
        self._asked += 1
        return photo, self._requests[photo]

    def answered(self, answer: Answer) -> None:
        """A caller has an answer."""
        self._first.set()
        self._answers.append(answer)

    def missed(self) -> None:
        """A caller will have none."""
        self._lost.append(time.perf_counter())

    async def _call(self) -> None:
        """One caller: a connection, and another one when that is gone."""
        loop = asyncio.get_running_loop()
        while not self._over:
            try:
                transport, line = await loop.create_connection(
                    lambda: _Line(self), "127.0.0.1", self._port
                )
            except OSError:
                self.missed()
                await asyncio.sleep(_PAUSE)
                continue
            try:
                await line.closed
            finally:
                transport.abort()


class _Line(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._waiting = False
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        taken = self._load.next()
        if taken is None:
            self._transport.close()
            return
        self._photo, request = taken
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
        self._load.answered(
            Answer(
                now,
                now - self._started,
                self._photo,
                self._parser.get_status_code(),
                b"".join(self._body),
            )
        )
        if self._parser.should_keep_alive():
            self._ask()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting:
            self._load.missed()
        if not self.closed.done():
            self.closed.set_result(None)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; nan of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
