"""Mutants of the corpus against a real service: `python -m tests.robustness.fuzz --cases 100000`.

A case is one mutated picture, form or request head, and follows from the seed and its number
alone. Pictures go in batches with a good photo beside each, some of them alone as well. What must
hold: no 5xx but 503 and 504, the process lives and is ready, every answer has the documented
shape, the library gives the same verdict, every good photo its own answer, and memory is bounded.
A request that breaks this is saved as the bytes that were sent: `--replay FILE` sends them again.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.robustness import requests
from tests.robustness.mutate import Mutator
from tests.robustness.oracle import Answer, complaint
from tests.robustness.requests import Case
from tests.support.live_server import Live, get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

PICTURES, ALONE, FORMS, HEADS = 16, 2, 4, 4  # of a round
MAX_PIXELS = 4_000_000
GROWTH = 150_000_000
"""Bytes of memory that the service may take beyond what it had after its first rounds."""

_PATIENCE = 30.0
_WARM, _TELLING = 20, 5.0  # rounds before memory is compared, seconds between lines
_FOR_HEADS = 0.3  # a head that promises more than it sends is waited for no longer


@dataclass
class Report:
    """What came of it. outcomes: how often each; faults: what was wrong and where it was saved."""

    cases: int = 0
    requests: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    grown: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.cases / max(self.seconds, 1e-9)
        known = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        return (
            f"{self.cases} cases in {self.requests} requests, {self.seconds:.0f} s, {rate:.0f}/s, "
            f"slowest {self.slowest:.2f} s, memory +{self.grown / 1e6:.0f} MB, "
            f"{len(self.faults)} faults\n  {known}"
        )


class Fuzz:
    """One service and what is known of it."""

    def __init__(self, server: Live, folder: Path) -> None:
        """Ask for the good photos alone; `folder` takes requests that find a fault."""
        self.server, self.folder = server, folder
        self.photos = [photo(seed) for seed in range(4)]
        self.good = tuple(post(f"{server.url}/predict", data).json() for data in self.photos)
        self.mutator = Mutator()
        self.report = Report()
        self.processes = processes(server.process.pid).keys()

    def round(self, seed: int, number: int) -> None:
        """The cases of one round."""
        rng = random.Random(f"{seed}-{number}")
        mutants = [self.mutator.image(rng) for _ in range(PICTURES)]
        beside = [self.photos[n % len(self.photos)] for n in range(PICTURES)]
        pairs = zip(beside, mutants, strict=True)
        wanted = [requests.batch(tuple(data for pair in pairs for data in pair))]
        wanted += [requests.alone(data) for data in mutants[:ALONE]]
        wanted += [requests.form(rng, [*mutants, *self.photos]) for _ in range(FORMS)]
        wanted += [requests.head(rng, self.photos) for _ in range(HEADS)]
        for order, case in enumerate(wanted):
            self.ask(case, f"{seed}-{number}-{order}")
        self.report.cases += PICTURES + FORMS + HEADS

    def ask(self, case: Case, name: str) -> None:
        """Send one request, judge the answer, and ask whether the service is as it was."""
        start = time.perf_counter()
        answer = send(self.server.port, case)
        self.report.slowest = max(self.report.slowest, time.perf_counter() - start)
        self.report.requests += 1
        # Before the library tries it here: what kills the one would kill the other.
        wrong = self.dead()
        if not wrong:
            wrong, outcomes = complaint(case, answer, self.good, MAX_PIXELS)
            self.report.outcomes.update(outcomes if case.kind != "alone" else [])
        if wrong:
            path = self.folder / f"{name}.http"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(case.raw)
            self.report.faults.append(f"{path}: {case.kind}: {wrong}")

    def dead(self) -> str | None:
        """Why the service is no longer what it was, or None."""
        if self.server.process.poll() is not None:
            return f"the service ended with {self.server.process.returncode}"
        return None

    def ready(self) -> bool:
        return get(f"{self.server.url}/readyz").status_code == 200


def send(port: int, case: Case) -> Answer | None:
    """Send bytes as they are; None is no answer."""
    patience = _FOR_HEADS if case.kind == "head" else _PATIENCE
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=patience) as line:
            with suppress(OSError):  # it has heard enough, and may have answered
                line.sendall(case.raw)
            response = http.client.HTTPResponse(line, method=case.method)
            response.begin()
            media_type = (response.getheader("content-type") or "").partition(";")[0]
            return Answer(response.status, media_type, response.read())
    except (OSError, http.client.HTTPException):
        return None


def processes(session: int) -> dict[int, int]:
    """Number -> bytes that it holds, of the processes of a session; none where nobody tells."""
    held = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it is gone meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                pages = int((folder / "statm").read_text().split()[1])
                held[int(folder.name)] = pages * os.sysconf("SC_PAGE_SIZE")
    return held


def run(
    fuzz: Fuzz, cases: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Rounds until there were `cases`, the service died, or there are faults enough."""
    report, start = fuzz.report, time.perf_counter()
    told, number, base = start, 0, 0
    while report.cases < cases and not fuzz.dead() and len(report.faults) < 20:
        fuzz.round(seed, number)
        number += 1
        now, held = time.perf_counter(), processes(fuzz.server.process.pid)
        if held.keys() != fuzz.processes:
            report.faults.append(f"round {seed}-{number - 1}: a process ended, or was replaced")
            fuzz.processes = held.keys()
        base = base or (sum(held.values()) if number == _WARM else 0)
        report.seconds, report.grown = now - start, sum(held.values()) - base if base else 0
        if now - told > _TELLING:
            told = now
            say(str(report))
    if report.grown > GROWTH:
        report.faults.append(f"memory grew by {report.grown} bytes")
    if not fuzz.dead() and not fuzz.ready():
        report.faults.append("the service is not ready any more")
    return report


@contextmanager
def service() -> Iterator[Live]:
    """A service with a bundle of its own."""
    with tempfile.TemporaryDirectory(prefix="fledge-fuzz-") as name:
        folder = Path(name)
        limits = {"FLEDGE_MAX_PIXELS": str(MAX_PIXELS), "FLEDGE_DEVICE": "cpu"}
        with live(tiny_bundle(folder / "bundle"), folder / "log", **limits) as server:
            yield server


def replay(path: Path) -> str:
    """Send a saved request again, and say what came back."""
    raw = path.read_bytes()
    case = Case("form", raw, method=raw.partition(b" ")[0].decode("latin-1"))
    with service() as server:
        answer: Any = send(server.port, case)
        time.sleep(0.2)
        told = (
            f"{answer.status} {answer.media_type}\n{answer.body.decode('utf-8', 'replace')}"
            if answer
            else "no answer"
        )
        ended = server.process.poll()
        log = server.log.read_text()
    return f"{told}\n{'the service lives' if ended is None else f'it ended with {ended}'}\n{log}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.replay:
        print(replay(options.replay))
        return 0
    with service() as server:
        report = run(Fuzz(server, options.failures), options.cases, options.seed, print)
    print(report)
    for fault in report.faults:
        print(fault)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
