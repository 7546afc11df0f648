"""Fuzz a real service with mutated images and requests.

    python -m tests.robustness.fuzz --cases 100000 --seed 1

A case is one mutated picture, form or request head, and depends only on the seed and its number.
Pictures are sent in batches, each beside a valid photo, and some also as single requests. These
must hold: no status 5xx except 503 and 504; the processes stay alive and ready; every answer has
the documented format; the library gives the same result; the valid photos are answered as without
the mutants; memory stays bounded. A request that violates one is saved as the bytes that were
sent, and `--replay FILE` sends them again.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.robustness import requests
from tests.robustness.mutate import Mutator
from tests.robustness.oracle import Answer, check
from tests.robustness.requests import Case
from tests.support.live_server import Live, get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

PICTURES, SINGLE, FORMS, HEADS = 16, 2, 4, 4  # per round
MAX_PIXELS = 4_000_000
MAX_GROWTH = 150_000_000
"""Bytes by which the service's memory may grow after the warm-up rounds."""

_TIMEOUT = 30.0
_HEAD_TIMEOUT = 0.3  # the service waits for bytes that a malformed head announces
_WARM_UP = 20  # rounds before the reference value of the memory is taken
_LOG_INTERVAL = 5.0  # seconds


@dataclass
class Report:
    """Results. outcomes: the count of each. faults: descriptions with the file of the request."""

    cases: int = 0
    requests: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    grown: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.cases / max(self.seconds, 1e-9)
        counts = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        return (
            f"{self.cases} cases in {self.requests} requests, {self.seconds:.0f} s, {rate:.0f}/s, "
            f"slowest {self.slowest:.2f} s, memory +{self.grown / 1e6:.0f} MB, "
            f"{len(self.faults)} faults\n  {counts}"
        )


class Fuzzer:
    """Sends cases to one service and collects the faults."""

    def __init__(self, server: Live, folder: Path) -> None:
        """Get the answers of the valid photos. folder: for requests that reveal a fault."""
        self.server, self.folder = server, folder
        self.photos = [photo(seed) for seed in range(4)]
        self.good = tuple(post(f"{server.url}/predict", data).json() for data in self.photos)
        self.mutator = Mutator()
        self.report = Report()
        self.processes = processes(server.process.pid).keys()

    def round(self, seed: int, number: int) -> None:
        """Send the cases of one round."""
        rng = random.Random(f"{seed}-{number}")
        mutants = [self.mutator.image(rng) for _ in range(PICTURES)]
        beside = [self.photos[n % len(self.photos)] for n in range(PICTURES)]
        pairs = zip(beside, mutants, strict=True)
        cases = [requests.batch(tuple(data for pair in pairs for data in pair))]
        cases += [requests.single(data) for data in mutants[:SINGLE]]
        cases += [requests.form(rng, [*mutants, *self.photos]) for _ in range(FORMS)]
        heads = [requests.head(rng, self.photos) for _ in range(HEADS)]
        for order, case in enumerate(cases):
            self.send(case, f"{seed}-{number}-{order}")
        # Side by side, because many get no answer until the timeout.
        with ThreadPoolExecutor(HEADS) as pool:
            answers = list(pool.map(lambda case: send(self.server.port, case), heads))
        for order, (case, answer) in enumerate(zip(heads, answers, strict=True), len(cases)):
            self.check(case, answer, f"{seed}-{number}-{order}")
        self.report.cases += PICTURES + FORMS + HEADS

    def send(self, case: Case, name: str) -> None:
        """Send one request, and check the answer and that the service is still running."""
        start = time.perf_counter()
        answer = send(self.server.port, case)
        self.report.slowest = max(self.report.slowest, time.perf_counter() - start)
        self.check(case, answer, name)

    def check(self, case: Case, answer: Answer | None, name: str) -> None:
        """Check the answer to a request."""
        self.report.requests += 1
        # Checked first: a request that crashes the service would crash the library here, too.
        fault = self.exited()
        if not fault:
            fault, outcomes = check(case, answer, self.good, MAX_PIXELS)
            self.report.outcomes.update(outcomes if case.kind != "single" else [])
        if fault:
            path = self.folder / f"{name}.http"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(case.raw)
            self.report.faults.append(f"{path}: {case.kind}: {fault}")

    def exited(self) -> str | None:
        """The fault, if the service has exited."""
        if self.server.process.poll() is not None:
            return f"the service exited with {self.server.process.returncode}"
        return None

    def ready(self) -> bool:
        return get(f"{self.server.url}/readyz").status_code == 200


def send(port: int, case: Case) -> Answer | None:
    """Send the bytes of a request; None if there is no answer."""
    timeout = _HEAD_TIMEOUT if case.kind == "head" else _TIMEOUT
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
            with suppress(OSError):  # the service may answer before it has read everything
                connection.sendall(case.raw)
            response = http.client.HTTPResponse(connection, method=case.method)
            response.begin()
            media_type = (response.getheader("content-type") or "").partition(";")[0]
            return Answer(response.status, media_type, response.read())
    except (OSError, http.client.HTTPException):
        return None


def processes(session: int) -> dict[int, int]:
    """PID -> resident bytes of the processes of a session; empty on systems without /proc."""
    resident = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # the process has exited meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                pages = int((folder / "statm").read_text().split()[1])
                resident[int(folder.name)] = pages * os.sysconf("SC_PAGE_SIZE")
    return resident


def run(
    fuzzer: Fuzzer, cases: int, seed: int, log: Callable[[str], None] = lambda line: None
) -> Report:
    """Send rounds until there are `cases` cases or 20 faults, or the service has exited."""
    report, start = fuzzer.report, time.perf_counter()
    logged, number, base = start, 0, 0
    while report.cases < cases and not fuzzer.exited() and len(report.faults) < 20:
        fuzzer.round(seed, number)
        number += 1
        now, resident = time.perf_counter(), processes(fuzzer.server.process.pid)
        if resident.keys() != fuzzer.processes:
            report.faults.append(f"round {seed}-{number - 1}: a process exited or was replaced")
            fuzzer.processes = resident.keys()
        total = sum(resident.values())
        base = base or (total if number == _WARM_UP else 0)
        report.seconds, report.grown = now - start, total - base if base else 0
        if now - logged > _LOG_INTERVAL:
            logged = now
            log(str(report))
    if report.grown > MAX_GROWTH:
        report.faults.append(f"memory grew by {report.grown} bytes")
    if not fuzzer.exited() and not fuzzer.ready():
        report.faults.append("the service is no longer ready")
    return report


@contextmanager
def service() -> Iterator[Live]:
    """Run a service with a small bundle."""
    with tempfile.TemporaryDirectory(prefix="fledge-fuzz-") as name:
        folder = Path(name)
        limits = {"FLEDGE_MAX_PIXELS": str(MAX_PIXELS), "FLEDGE_DEVICE": "cpu"}
        with live(tiny_bundle(folder / "bundle"), folder / "log", **limits) as server:
            yield server


def replay(path: Path) -> str:
    """Send a saved request again; returns the answer and the service's log."""
    raw = path.read_bytes()
    case = Case("form", raw, method=raw.partition(b" ")[0].decode("latin-1"))
    with service() as server:
        answer: Any = send(server.port, case)
        time.sleep(0.2)
        text = (
            f"{answer.status} {answer.media_type}\n{answer.body.decode('utf-8', 'replace')}"
            if answer
            else "no answer"
        )
        status = server.process.poll()
        log = server.log.read_text()
    state = "the service is running" if status is None else f"the service exited with {status}"
    return f"{text}\n{state}\n{log}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.replay:
        print(replay(options.replay))
        return 0
    with service() as server:
        report = run(Fuzzer(server, options.failures), options.cases, options.seed, print)
    print(report)
    for fault in report.faults:
        print(fault)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
