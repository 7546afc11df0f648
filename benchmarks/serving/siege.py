"""Attack the service with everything at once, beside honest callers.

    python -m benchmarks.serving.siege --bundle bundle --photos photos --minutes 10

The service has the memory of a container of 1 GiB (FLEDGE_MAX_MEMORY). The attackers send pictures
that are cheap to send and expensive to decode, batches of them, endless and half heads, bodies that
stall or never come, silent connections, forms that are slow to split, requests whose client
disconnects, or reads nothing, or little, large requests far in advance, and many for BentoML's
pages. The honest callers send photos one after the other. The exit status is 1 if less than 95 % of
the honest requests got the right answer (429 aside), their 99th percentile is 2 s or more, memory
grew beyond its budget, the service restarted, or an attack ended otherwise than it should.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import uvloop

from benchmarks import machine
from benchmarks.serving.load_generator import percentile
from benchmarks.serving.photos import choose
from benchmarks.serving.processes import HOST, MB, Meter, free_port, serving
from tests.hostile.images import (
    WORST,
    noisy_tiff,
    png_with_profile,
    profile_of_shared_elements,
    progressive_jpeg,
)

MAX_MEMORY: Final = 512 * 2**20
SLACK: Final = 250.0
"""MB beyond FLEDGE_MAX_MEMORY: connections, the log, and the processes that decode."""
LEAST_RIGHT: Final = 0.95
MOST_SECONDS: Final = 2.0
_TIMEOUT: Final = 30.0
_HONEST: Final = 4
_PAUSE: Final = 0.2
"""Seconds between two attacks of one attacker. The attackers share the cores with the service."""
_HOST_FIELD: Final = b"Host: localhost\r\n"
_SCRIPT: Final = "/static_content/swagger-ui-bundle.js"
_PAGES: Final = ("/docs.json", "/schema.json", "/metrics", "/docs", _SCRIPT)
_LARGE: Final = b"GET %s HTTP/1.1\r\n%s\r\n" % (_SCRIPT.encode(), _HOST_FIELD)
_UNREAD_SECONDS: Final = 40.0
_TRICKLE_SECONDS: Final = 70.0
"""Time after which a connection that reads nothing, or little, must have been closed."""

_GONE: Final = frozenset({"closed", "ConnectionResetError", "BrokenPipeError"})
KINDS: Final[dict[str, tuple[int, frozenset[str]]]] = {
    "picture": (3, frozenset({"200", "413", "422", "429", "504"})),
    "batch": (1, frozenset({"200", "429"})),
    "disconnect": (2, frozenset({"disconnected"})),
    "endless_head": (2, _GONE | {"431", "429"}),
    "half_head": (50, _GONE | {"408"}),
    "silent": (200, _GONE),
    "stalled_body": (4, _GONE | {"408", "429"}),
    "no_body": (100, frozenset({"408"})),
    "slow_form": (1, frozenset({"415", "429"})),
    "unread": (80, _GONE),
    "trickle": (10, _GONE),
    "in_advance": (1, _GONE),
    "pages": (10, frozenset({"200"})),
}
"""Number of attackers of each kind, and the outcomes that their attacks should have: a status, what
became of the connection, or the error at the attacker."""


class Siege:
    """Honest callers and attackers of one service.

    Attributes:
        honest: (status, whether the label was right, seconds) of each honest request.
        attacks: Number of attacks by kind and outcome.
    """

    def __init__(self, port: int, photos: list[bytes]) -> None:
        self._port, self._photos = port, photos
        self._labels: dict[int, str] = {}
        self._random = random.Random(0)
        self._pictures = [build(1500, 1500) for build in WORST.values()]
        self._pictures += [
            progressive_jpeg(10_000, 10_000),
            progressive_jpeg(5000, 5000, scans=94),
            WORST["webp-lossless"](4000, 4000),
            WORST["png-rgba-16-bit"](2500, 2500),
            png_with_profile(profile_of_shared_elements(20_000)),
            noisy_tiff(),
        ]
        self.honest: list[tuple[int, bool, float]] = []
        self.attacks: Counter[tuple[str, str]] = Counter()

    async def run(self, seconds: float) -> None:
        """Run honest callers and attackers for some seconds."""
        end = time.monotonic() + seconds
        for number in range(len(self._photos)):  # the right answers, before the attack
            status, body = await self._post(self._photos[number], "/predict")
            if status != 200:
                raise SystemExit(f"photo {number} got status {status} before the attack")
            self._labels[number] = json.loads(body)["predictions"][0]["label"]
        callers = [self._call(end) for _ in range(_HONEST)]
        attackers = [
            self._attack(kind, getattr(self, f"_{kind}"), end)
            for kind, (number, _) in KINDS.items()
            for _ in range(number)
        ]
        await asyncio.gather(*callers, *attackers)

    async def _call(self, end: float) -> None:
        for number in itertools.cycle(range(len(self._photos))):
            if time.monotonic() > end:
                return
            start = time.perf_counter()
            status, body = 0, b""
            with contextlib.suppress(OSError, TimeoutError, ValueError):
                status, body = await self._post(self._photos[number], "/predict")
            right = status == 200 and (
                json.loads(body)["predictions"][0]["label"] == self._labels[number]
            )
            self.honest.append((status, right, time.perf_counter() - start))
            await asyncio.sleep(0.05)

    async def _attack(self, kind: str, attack: Callable[[], Awaitable[str]], end: float) -> None:
        while time.monotonic() < end:
            try:
                outcome = await attack()
            except (OSError, TimeoutError, ValueError) as error:
                outcome = type(error).__name__
            self.attacks[kind, outcome] += 1
            await asyncio.sleep(_PAUSE)

    async def _post(self, data: bytes, path: str, media: str = "image/jpeg") -> tuple[int, bytes]:
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection(HOST, self._port)
            try:
                writer.write(_head(path, media, len(data)) + data)
                await writer.drain()
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return int(head.split(b" ", 2)[1]), body

    async def _picture(self) -> str:
        status, _ = await self._post(self._random.choice(self._pictures), "/predict?tta=1")
        return str(status)

    async def _batch(self) -> str:
        part = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        pictures = [one for one in self._pictures if len(one) < 200_000]
        body = b"".join(part + self._random.choice(pictures) + b"\r\n" for _ in range(64))
        media = "multipart/form-data; boundary=b"
        status, _ = await self._post(body + b"--b--\r\n", "/predict/batch", media)
        return str(status)

    async def _slow_form(self) -> str:
        """A form full of what looks like a boundary, and is none."""
        head = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        body = head + b"\r\n--bx" * 1_000_000 + b"\r\n--b--\r\n"
        status, _ = await self._post(body, "/predict", "multipart/form-data; boundary=b")
        return str(status)

    async def _no_body(self) -> str:
        return await self._held(_head("/predict", "image/jpeg", 9), b"", 1.0)

    async def _unread(self) -> str:
        return await self._slow_reader(0, _UNREAD_SECONDS)

    async def _trickle(self) -> str:
        return await self._slow_reader(4096, _TRICKLE_SECONDS)

    async def _slow_reader(self, piece: int, seconds: float) -> str:
        """Ask for much, and read `piece` bytes a second, until the service closes."""
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (HOST, self._port))
            await loop.sock_sendall(client, _LARGE * 10)
            closed = select.poll()
            closed.register(client, select.POLLHUP)
            for _ in range(int(seconds)):
                await asyncio.sleep(1)
                if closed.poll(0):
                    return "closed"
                with contextlib.suppress(BlockingIOError):
                    if piece and not client.recv(piece):
                        return "closed"
        return "kept"

    async def _in_advance(self) -> str:
        large = b"GET /x HTTP/1.1\r\n" + _HOST_FIELD + b"X: " + b"a" * 60_000 + b"\r\n\r\n"
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            async with asyncio.timeout(_TIMEOUT):
                writer.write(large * 900)
                writer.write_eof()
                while await reader.read(2**20):
                    pass
        finally:
            writer.close()
        return "closed"

    async def _pages(self) -> str:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            async with asyncio.timeout(_TIMEOUT):
                for path in _PAGES:
                    writer.write(b"GET %s HTTP/1.1\r\n%s\r\n" % (path.encode(), _HOST_FIELD))
                    head = await reader.readuntil(b"\r\n\r\n")
                    if b" 200 " not in head[:20]:
                        return head[9:12].decode()
                    length = head.lower().partition(b"content-length:")[2].split(None, 1)[0]
                    await reader.readexactly(int(length))
        finally:
            writer.close()
        return "200"

    async def _disconnect(self) -> str:
        _, writer = await asyncio.open_connection(HOST, self._port)
        data = self._random.choice(self._pictures)
        writer.write(_head("/predict", "image/jpeg", len(data)) + data)
        await asyncio.sleep(self._random.uniform(0, 0.3))
        writer.transport.abort()
        return "disconnected"

    async def _endless_head(self) -> str:
        return await self._held(
            b"GET / HTTP/1.1\r\n" + _HOST_FIELD, b"X: " + b"a" * 1000 + b"\r\n", 0
        )

    async def _half_head(self) -> str:
        return await self._held(b"GET / HTTP/1.1\r\n", b"X", 1.0)

    async def _silent(self) -> str:
        return await self._held(b"", b"", 1.0)

    async def _stalled_body(self) -> str:
        return await self._held(
            _head("/predict", "image/jpeg", 15_000_000) + bytes(14 * 2**20), b"", 1
        )

    async def _held(self, first: bytes, piece: bytes, pause: float) -> str:
        """Send `first`, then `piece` again and again, until the service closes the connection.

        Returns:
            The status of its answer; "closed" if there was none.
        """
        reader, writer = await asyncio.open_connection(HOST, self._port)
        ended = asyncio.create_task(reader.read())
        try:
            async with asyncio.timeout(_TIMEOUT):
                writer.write(first)
                while not ended.done():
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.wait([ended], timeout=pause) if pause else await asyncio.sleep(0)
                answer = await ended
        finally:
            writer.close()
            ended.cancel()
        return answer[9:12].decode() if answer else "closed"


def _head(path: str, media: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


async def _sample(meter: Meter, siege: Siege, seconds: float, memory: list[float]) -> None:
    begun = time.monotonic()
    while (now := time.monotonic() - begun) < seconds:
        meter.start()  # updates the process tree and the memory
        memory.append(meter.peak)
        if len(memory) % 150 == 0:
            statuses = Counter(status for status, _, _ in siege.honest)
            attacks = sum(siege.attacks.values())
            print(
                f"{now:4.0f} s: {memory[-1]:.0f} MB, {dict(statuses)}, {attacks} attacks",
                flush=True,
            )
        await asyncio.sleep(0.2)


async def _run(pid: int, port: int, photos: list[bytes], minutes: float) -> bool:
    siege, meter, memory = Siege(port, photos), Meter(pid), list[float]()
    seconds = 60 * minutes
    await asyncio.gather(siege.run(seconds), _sample(meter, siege, seconds, memory))
    print("\n| attack | outcome | times |\n|---|---|---:|")
    for (kind, outcome), count in sorted(siege.attacks.items()):
        print(f"| {kind} | {outcome} | {count} |")
    counted = [one for one in siege.honest if one[0] != 429]
    right = sum(right for _, right, _ in counted) / max(1, len(counted))
    p50, p99 = (percentile([one[2] for one in counted], share) for share in (0.5, 0.99))
    most = meter.rest + MAX_MEMORY / MB + SLACK
    print(
        f"\nhonest requests {len(siege.honest)}, 429 for {len(siege.honest) - len(counted)}; right "
        f"{right:.1%}; p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms\n"
        f"memory: {meter.rest:.0f} MB at rest, {max(memory):.0f} MB at most ({most:.0f} allowed)"
    )
    wrong = [pair for pair in siege.attacks if pair[1] not in KINDS[pair[0]][1]]
    wrong += [
        (kind, "never done") for kind in KINDS if kind not in {done for done, _ in siege.attacks}
    ]
    for kind, outcome in wrong:
        print(f"an attack should not end so: {kind}, {outcome}")
    return not wrong and right >= LEAST_RIGHT and p99 < MOST_SECONDS and max(memory) < most


def main() -> int:
    """Start the service, run the siege, print the results; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="a folder with JPEGs")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/siege"))
    options = parser.parse_args()
    photos = [path.read_bytes() for path in choose(options.photos)]
    port = free_port()
    command = [sys.executable, "-m", "fledge", "serve", str(options.bundle), "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLEDGE_")}
    env["FLEDGE_MAX_MEMORY"] = str(MAX_MEMORY)
    print(machine.describe(len(os.sched_getaffinity(0)), "cpu"), flush=True)
    # A service that has ended does not start again: `serving` fails at its end.
    with serving(command, env, port, "/readyz", options.out / "service.log") as server:
        held = uvloop.run(_run(server.pid, port, photos, options.minutes))
        alive = Path(f"/proc/{server.pid}").exists()
    print("the service held" if held and alive else "the service did not hold")
    return 0 if held and alive else 1


if __name__ == "__main__":
    sys.exit(main())
