"""Soak the service: more than it can do, bad input, callers that vanish, new versions, for long.

    python benchmarks/serving/soak.py --bundle bundle --photos photos --minutes 10

Finds what the service can do, then sends 1.5 times as much, whether or not it answers. Of a
hundred requests 85 are photos, 8 odd or broken files, 2 batches of four; 5 callers hang up, half
of them in the middle of their body. A manifest is replaced every 20 seconds. Ends with 1 when a
request was not answered, an answer was wrong, or memory grew by 3 % or more after the first minute.
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
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from benchmarks import machine
from benchmarks.serving import photos as serve_photos
from benchmarks.serving import processes
from benchmarks.serving.load_generator import Load, percentile
from benchmarks.serving.processes import HOST, Meter
from serving.bundle import storage
from tests.robustness import corpus, oracle

SWAP: Final = 20.0
GROWTH: Final = 0.03
_TICK: Final = 0.02
_PATIENCE: Final = 30.0
SHARES: Final = {"photo": 85, "odd": 8, "batch": 2, "cut off": 2.5, "gone": 2.5}
BUSY: Final = (429, 504)
"""What a service with too much to do may answer to anything."""


class Told(NamedTuple):
    """A request's kind, the status of its answer, 0 for none, and its seconds."""

    kind: str
    status: int
    seconds: float


class Soak:
    """Sends, and judges what comes back."""

    def __init__(self, port: int, photos: list[Path], best: list[str]) -> None:
        """`best`: the label that each photo has when it is asked alone."""
        self._port, self._best = port, best
        self._photos = [photo.read_bytes() for photo in photos]
        self._odd = corpus.items()
        self._random = random.Random(0)
        self.told: list[Told] = []
        self.wrong: list[str] = []
        self.open = 0

    async def run(self, rate: float, seconds: float) -> None:
        """`rate` requests a second for so long, then wait for the last answers."""
        begun, sent = time.perf_counter(), 0
        tasks: set[asyncio.Task[None]] = set()
        while (now := time.perf_counter() - begun) < seconds:
            while sent < now * rate:
                task = asyncio.create_task(self._one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            self.open = len(tasks)
            await asyncio.sleep(_TICK)
        if tasks:
            await asyncio.wait(set(tasks), timeout=_PATIENCE)

    async def _one(self) -> None:
        (kind,) = self._random.choices(list(SHARES), list(SHARES.values()))
        number = self._random.randrange(len(self._photos))
        odd = self._random.choice(self._odd)
        data = odd.data if kind == "odd" else self._photos[number]
        head, body = self._request(kind, data)
        started = time.perf_counter()
        status, text = 0, b""
        try:
            async with asyncio.timeout(_PATIENCE):
                reader, writer = await asyncio.open_connection(HOST, self._port)
                try:
                    half = kind == "cut off"
                    writer.write(head + (body[: len(body) // 2] if half else body))
                    await writer.drain()
                    if half or kind == "gone":
                        self.told.append(Told(kind, 0, time.perf_counter() - started))
                        writer.transport.abort()
                        return
                    status, text = _answer(await reader.read())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError) as error:
            self.wrong.append(f"{kind}: no answer ({type(error).__name__} {error})")
        self.told.append(Told(kind, status, time.perf_counter() - started))
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

    def _fault(self, kind: str, status: int, text: bytes, number: int, odd) -> str | None:
        if kind == "batch" and status == 200:
            codes = {item.get("error", {}).get("code", "ok") for item in json.loads(text)}
            strange = codes - {"ok", "overloaded", "deadline-exceeded"}
            return f"answers of a batch: {strange}" if strange else None
        if status in BUSY:
            return None
        expected = oracle.CODES[odd.code] if kind == "odd" and odd.code else 200
        if status != expected:
            return f"status {status} for {expected}: {text[:200]!r}"
        if kind == "photo":
            label = json.loads(text)["predictions"][0]["label"]
            return None if label == self._best[number] else f"{label} for {self._best[number]}"
        return None


def _answer(raw: bytes) -> tuple[int, bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


async def _swap(folder: Path, seconds: float, done: list[int]) -> None:
    """Publish the same model under another manifest, again and again."""
    until = time.monotonic() + seconds - SWAP / 2
    while time.monotonic() + SWAP < until:
        await asyncio.sleep(SWAP)
        manifest = storage.read(folder).manifest
        facts = {**manifest.provenance, "swap": len(done) + 1}
        storage.publish(replace(manifest, provenance=facts), folder)
        done.append(1)


async def _weigh(meter: Meter, soak: Soak, seconds: float, found: list[float]) -> None:
    """MB of all processes, once a second; a line every 30 s."""
    begun = time.monotonic()
    while (now := time.monotonic() - begun) < seconds:
        meter.start()  # finds new processes, and weighs
        found.append(meter.peak)
        if len(found) % 30 == 0:
            counts = Counter(one.status for one in soak.told)
            said = ", ".join(f"{status or 'left'} {n}" for status, n in counts.most_common())
            print(f"{now:4.0f} s: {found[-1]:.0f} MB, {said}; wrong {len(soak.wrong)}", flush=True)
        await asyncio.sleep(1 - (time.monotonic() - begun) % 1)


async def _all(live: processes.Live, folder: Path, options: argparse.Namespace) -> bool:
    photos = serve_photos.choose(options.photos)
    requests = serve_photos.requests(photos, live.port, "/predict", None)
    meter = Meter(live.pid)
    window = await Load(live.port, requests).run(16, 1.0, options.probe, meter)
    capacity = len(window.answers) / window.seconds
    answers = {one.photo: json.loads(one.body) for one in window.answers}
    if len(answers) < len(photos):
        raise SystemExit("the service is too slow to be asked every photo once; raise --probe")
    best = [answers[number]["predictions"][0]["label"] for number in range(len(photos))]
    rate = capacity * options.times
    print(f"16 callers: {capacity:.0f} answers a second; sending {rate:.0f} a second", flush=True)
    soak = Soak(live.port, photos, best)
    swaps: list[int] = []
    weights: list[float] = []
    seconds = options.minutes * 60
    await asyncio.gather(
        soak.run(rate, seconds),
        _swap(folder, seconds, swaps),
        _weigh(meter, soak, seconds, weights),
    )
    return _report(soak, weights, len(swaps), capacity, seconds)


def _report(soak: Soak, weights: list[float], swaps: int, capacity: float, seconds: float) -> bool:
    """Print what came out; whether it is as it should be."""
    table = Counter((one.kind, one.status) for one in soak.told)
    print("\n| request | answered | times |\n|---|---|---:|")
    for (kind, status), count in sorted(table.items()):
        print(f"| {kind} | {status or 'hung up'} | {count} |")
    took = [one.seconds for one in soak.told if one.status == 200 and one.kind == "photo"]
    p50, p99 = (1000 * percentile(took, share) for share in (0.5, 0.99))
    accepted = sum(one.status not in (0, *BUSY) for one in soak.told) / seconds
    minute = min(60, len(weights) // 2)
    early = statistics.median(weights[minute : minute + 30])
    late = statistics.median(weights[-30:])
    growth = late / early - 1
    print(
        f"\n{len(soak.told)} requests, {swaps} new versions; accepted {accepted:.0f} a second "
        f"({accepted / capacity:.2f} of what 16 callers got), p50 {p50:.0f} ms, p99 {p99:.0f} ms\n"
        f"memory after the first minute {early:.1f} MB, at the end {late:.1f} MB: {growth:+.1%}\n"
        f"wrong: {len(soak.wrong)}"
    )
    for line in soak.wrong[:20]:
        print(f"  {line}")
    return not soak.wrong and growth < GROWTH


def main() -> int:
    """Start the service, soak it, tell; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="JPEGs of 30 to 110 kB in it")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--times", type=float, default=1.5, help="of what 16 callers get")
    parser.add_argument("--probe", type=float, default=5, help="seconds to find that")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    folder = options.out / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(options.bundle, folder)
    port = processes.free_port()
    command = [sys.executable, "-m", "fledge", "serve", str(folder.resolve()), "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLEDGE_")}
    print(machine.describe(len(os.sched_getaffinity(0)), "cpu"), flush=True)
    log = options.out / "service.log"
    with processes.serving(command, env, port, "/readyz", log) as live:
        return 0 if uvloop.run(_all(live, folder, options)) else 1


if __name__ == "__main__":
    sys.exit(main())
