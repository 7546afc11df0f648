"""Soak test of the service: overload, bad input, disconnecting clients, model updates.

    python -m benchmarks.serving.soak --bundle bundle --photos photos --minutes 10

Measures the throughput of 16 callers, then sends 1.5 times as many requests, whether or not they
are answered. Of a hundred requests 85 are photos, 8 odd or broken files and 2 batches of four; in 5
the client disconnects, half of these in the middle of the body. Every 20 seconds a new version of
the bundle is published. The exit status is 1 if a request got no answer, an answer was wrong, or
memory grew by 3 % or more after the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from benchmarks import machine
from benchmarks.serving.load_generator import Load, percentile
from benchmarks.serving.photos import choose, requests
from benchmarks.serving.processes import HOST, Meter, RunningServer, free_port, serving
from serving.bundle import storage
from tests.robustness import corpus, oracle
from tests.robustness.scene import Item

PUBLISH_INTERVAL: Final = 20.0
MAX_GROWTH: Final = 0.03
_TICK: Final = 0.02
_TIMEOUT: Final = 30.0
SHARES: Final = {"photo": 85, "odd": 8, "batch": 2, "half a body": 2.5, "disconnect": 2.5}
"""Kinds of requests, in percent."""
BUSY: Final = (429, 504)
"""Statuses that an overloaded service may return for any request."""


class Result(NamedTuple):
    """A request. status: of its answer, 0 for none. seconds: until the answer was complete."""

    kind: str
    status: int
    seconds: float


class Soak:
    """Sends requests at a fixed rate and checks the answers."""

    def __init__(self, port: int, photos: list[Path], best: list[str]) -> None:
        """`best`: the label that the service returns for each photo without overload."""
        self._port, self._best = port, best
        self._photos = [photo.read_bytes() for photo in photos]
        self._odd = corpus.items()
        self._random = random.Random(0)
        self.results: list[Result] = []
        self.wrong: list[str] = []
        self.open = 0

    async def run(self, rate: float, seconds: float) -> None:
        """Send `rate` requests per second for `seconds`, then wait for the last answers."""
        begun, sent = time.perf_counter(), 0
        tasks: set[asyncio.Task[None]] = set()
        while (now := time.perf_counter() - begun) < seconds:
            while sent < now * rate:
                task = asyncio.create_task(self._send_one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            self.open = len(tasks)
            await asyncio.sleep(_TICK)
        if tasks:
            await asyncio.wait(set(tasks), timeout=_TIMEOUT)

    async def _send_one(self) -> None:
        (kind,) = self._random.choices(list(SHARES), list(SHARES.values()))
        number = self._random.randrange(len(self._photos))
        odd = self._random.choice(self._odd)
        data = odd.data if kind == "odd" else self._photos[number]
        head, body = self._request(kind, data)
        started = time.perf_counter()
        status, text = 0, b""
        try:
            async with asyncio.timeout(_TIMEOUT):
                reader, writer = await asyncio.open_connection(HOST, self._port)
                try:
                    half = kind == "half a body"
                    writer.write(head + (body[: len(body) // 2] if half else body))
                    await writer.drain()
                    if half or kind == "disconnect":
                        self.results.append(Result(kind, 0, time.perf_counter() - started))
                        writer.transport.abort()
                        return
                    status, text = _parse(await reader.read())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError) as error:
            self.wrong.append(f"{kind}: no answer ({type(error).__name__} {error})")
        self.results.append(Result(kind, status, time.perf_counter() - started))
        if status and (fault := self._fault(kind, status, text, number, odd)):
            self.wrong.append(f"{kind} {odd.name if kind == 'odd' else ''}: {fault}")

    def _request(self, kind: str, data: bytes) -> tuple[bytes, bytes]:
        path, media = "/predict", "image/jpeg"
        if kind == "batch":
            path, media = "/predict/batch", "multipart/form-data; boundary=soak"
            part = b'--soak\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
            data = b"".join([(part + data + b"\r\n") * 4, b"--soak--\r\n"])
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {media}\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode(), data

    def _fault(self, kind: str, status: int, text: bytes, number: int, odd: Item) -> str | None:
        """What is wrong with an answer, or None."""
        if kind == "batch" and status == 200:
            codes = {item.get("error", {}).get("code", "ok") for item in json.loads(text)}
            unexpected = codes - {"ok", "overloaded", "deadline-exceeded"}
            return f"answers of a batch: {unexpected}" if unexpected else None
        if status in BUSY:
            return None
        expected = oracle.CODES[odd.code] if kind == "odd" and odd.code else 200
        if status != expected:
            return f"status {status} for {expected}: {text[:200]!r}"
        if kind == "photo":
            label = json.loads(text)["predictions"][0]["label"]
            return None if label == self._best[number] else f"{label} for {self._best[number]}"
        return None


def _parse(raw: bytes) -> tuple[int, bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


async def _publish_versions(folder: Path, seconds: float, published: list[int]) -> None:
    """Publish the same model with another manifest every `PUBLISH_INTERVAL` seconds."""
    end = time.monotonic() + seconds - PUBLISH_INTERVAL / 2
    while time.monotonic() + PUBLISH_INTERVAL < end:
        await asyncio.sleep(PUBLISH_INTERVAL)
        manifest = storage.read(folder).manifest
        provenance = {**manifest.provenance, "swap": len(published) + 1}
        storage.publish(manifest.model_copy(update={"provenance": provenance}), folder)
        published.append(1)


async def _sample_memory(meter: Meter, soak: Soak, seconds: float, memory: list[float]) -> None:
    """Append the MB of all processes once a second; print a line every 30 s."""
    begun = time.monotonic()
    while (now := time.monotonic() - begun) < seconds:
        meter.start()  # updates the process tree and the memory
        memory.append(meter.peak)
        if len(memory) % 30 == 0:
            counts = Counter(result.status for result in soak.results)
            statuses = ", ".join(f"{s or 'no answer'} {n}" for s, n in counts.most_common())
            line = f"{now:4.0f} s: {memory[-1]:.0f} MB, {statuses}; wrong {len(soak.wrong)}"
            print(line, flush=True)
        await asyncio.sleep(1 - (time.monotonic() - begun) % 1)


async def _soak(server: RunningServer, folder: Path, options: argparse.Namespace) -> bool:
    photos = choose(options.photos)
    bodies = requests(photos, server.port, "/predict", None)
    meter = Meter(server.pid)
    window = await Load(server.port, bodies).run(16, 1.0, options.probe, meter)
    capacity = len(window.answers) / window.seconds
    answers = {answer.photo: json.loads(answer.body) for answer in window.answers}
    if len(answers) < len(photos):
        raise SystemExit("not every photo was answered in --probe seconds; raise --probe")
    best = [answers[number]["predictions"][0]["label"] for number in range(len(photos))]
    rate = capacity * options.times
    print(
        f"16 callers: {capacity:.0f} answers per second; sending {rate:.0f} per second", flush=True
    )
    soak = Soak(server.port, photos, best)
    published: list[int] = []
    memory: list[float] = []
    seconds = options.minutes * 60
    await asyncio.gather(
        soak.run(rate, seconds),
        _publish_versions(folder, seconds, published),
        _sample_memory(meter, soak, seconds, memory),
    )
    return _report(soak, memory, len(published), capacity, seconds)


def _report(
    soak: Soak, memory: list[float], versions: int, capacity: float, seconds: float
) -> bool:
    """Print the results; returns whether the soak passed."""
    table = Counter((result.kind, result.status) for result in soak.results)
    print("\n| request | status | times |\n|---|---|---:|")
    for (kind, status), count in sorted(table.items()):
        print(f"| {kind} | {status or 'no answer'} | {count} |")
    photos = [result for result in soak.results if result.kind == "photo"]
    latencies = [result.seconds for result in photos if result.status == 200]
    p50, p99 = (1000 * percentile(latencies, share) for share in (0.5, 0.99))
    accepted = sum(result.status not in (0, *BUSY) for result in soak.results) / seconds
    minute = min(60, len(memory) // 2)
    early = statistics.median(memory[minute : minute + 30])
    late = statistics.median(memory[-30:])
    growth = late / early - 1
    print(
        f"\n{len(soak.results)} requests, {versions} new versions; accepted {accepted:.0f}/s "
        f"({accepted / capacity:.2f} of the rate of 16 callers), "
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms\n"
        f"memory after the first minute {early:.1f} MB, at the end {late:.1f} MB: {growth:+.1%}\n"
        f"wrong: {len(soak.wrong)}"
    )
    for line in soak.wrong[:20]:
        print(f"  {line}")
    return not soak.wrong and growth < MAX_GROWTH


def main() -> int:
    """Start the service, run the soak, print the results; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--photos", type=Path, required=True, help="a folder with JPEGs of 30 to 110 kB"
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--times", type=float, default=1.5, help="of the rate of 16 callers")
    parser.add_argument("--probe", type=float, default=5, help="seconds of measuring that rate")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    folder = options.out / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(options.bundle, folder)
    port = free_port()
    command = [sys.executable, "-m", "fledge", "serve", str(folder.resolve()), "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLEDGE_")}
    print(machine.describe(len(os.sched_getaffinity(0)), "cpu"), flush=True)
    log = options.out / "service.log"
    with serving(command, env, port, "/readyz", log) as server:
        return 0 if uvloop.run(_soak(server, folder, options)) else 1


if __name__ == "__main__":
    sys.exit(main())
