"""One competitor, one setting, one round: started, asked by few and by many, answers checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks import machine
from benchmarks.serving import photos as serve_photos
from benchmarks.serving import processes as serve_process
from benchmarks.serving.load_generator import Load, Window, percentile
from benchmarks.serving.peers import PROGRAMS, Peer, Setting

ROUTE: Final = "/predict"


@dataclass(frozen=True)
class Place:
    """What all measurements of one benchmark have in common.

    labels: the in-process computation's best label of each photo, by precision.
    """

    bundle: Path
    run: Path | None
    photos: tuple[Path, ...]
    labels: Mapping[str, Sequence[str]]
    callers: tuple[int, ...]
    threads: int
    seconds: float
    warm: float
    peers_python: Path
    out: Path


@dataclass(frozen=True)
class Row:
    """What came out with a number of callers; a line of results.jsonl.

    p50, p99, cpu, own_cpu: milliseconds, the last two of the processor an answer: of the server's
    processes, of the callers. rest, peak: MB. errors: requests without a good answer.
    others: good answers whose best label is not that of the in-process computation.
    start: seconds until it was ready. A limit has processes where others have callers.
    """

    peer: str
    setting: str
    round: int
    callers: int
    answers: int
    rps: float
    p50: float
    p99: float
    cpu: float
    own_cpu: float = 0.0
    rest: float = 0.0
    peak: float = 0.0
    errors: int = 0
    others: int = 0
    start: float = 0.0


def measure(peer: Peer, setting: Setting, turn: int, place: Place) -> list[Row]:
    """A row for each number of callers.

    Raises:
        serve_process.Failed: It did not start.
    """
    number = peer.settings.index(setting)
    log = place.out / "logs" / f"{peer.name}-setting{number}-round{turn}.log"
    if peer.limit:
        return [_bare(peer, setting, turn, callers, place, log) for callers in place.callers]
    port = serve_process.free_port()
    values = {
        **{"port": port, "bundle": place.bundle, "threads": place.threads},
        **{"python": sys.executable, "peers": place.peers_python},
    }
    command, chosen = setting.filled(values)
    env = {**environment(place), **chosen}
    asked = serve_photos.requests(place.photos, port, ROUTE, peer.form)
    labels = place.labels[peer.precision]
    rows = []
    with serve_process.serving(command, env, port, peer.ready, log) as server:
        rest = serve_process.Meter(server.pid).rest
        for callers in place.callers:
            meter = serve_process.Meter(server.pid)
            load = Load(port, asked)
            window = uvloop.run(load.run(callers, place.warm, place.seconds, meter))
            good = [answer for answer in window.answers if answer.status == 200]
            if not good:
                raise serve_process.Failed(f"{peer.name} gave no good answer; see {log}")
            others = sum(best_label(answer.body) != labels[answer.photo] for answer in good)
            rows.append(
                Row(
                    *(peer.name, setting.name, turn, callers, len(good)),
                    rps=len(good) / window.seconds,
                    **latencies([answer.seconds for answer in good]),
                    cpu=1000 * meter.cpu / max(1, len(good)),
                    own_cpu=1000 * window.own_cpu / max(1, len(good)),
                    rest=rest,
                    peak=meter.peak,
                    errors=errors(window),
                    others=others,
                    start=server.seconds,
                )
            )
    return rows


def environment(place: Place) -> dict[str, str]:
    """Variables for every server alike."""
    return {
        **machine.environment(),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(place.out / "bentoml"),
        "PEER_BUNDLE": str(place.bundle),
        "PEER_RUN": str(place.run or ""),
    }


def errors(window: Window) -> int:
    """Requests that got no good answer."""
    return window.lost + sum(answer.status != 200 for answer in window.answers)


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    return {f"p{share}": 1000 * percentile(seconds, share / 100) for share in (50, 99)}


def best_label(body: bytes) -> str:
    """The first of the answer's predictions; a batchable service answers by a list of one."""
    try:
        answer = json.loads(body)
        one = answer[0] if isinstance(answer, list) else answer
        return str(one["predictions"][0]["label"])
    except (ValueError, LookupError, TypeError):
        return ""


def labels_of(place: Place, precision: str) -> list[str]:
    """The best label of each photo by the in-process computation."""
    told = subprocess.run(
        [*_loop(place, precision), "--labels"],
        env=environment(place),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return list(json.loads(told.stdout))


def _bare(peer: Peer, setting: Setting, turn: int, callers: int, place: Place, log: Path) -> Row:
    """As many processes as there are callers, at most one a core; each a loop on one thread."""
    count = min(callers, place.threads)
    command = [
        *_loop(place, precision_of(peer, place.bundle)),
        *("--warm", str(place.warm), "--seconds", str(place.seconds)),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    told: list[dict[str, Any]] = []
    with log.open("w") as out:
        processes = [
            subprocess.Popen(
                command,
                env=environment(place),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
            )
            for _ in range(count)
        ]
        try:
            for process in processes:
                if not process.stdout or process.stdout.readline() != "ready\n":
                    raise serve_process.Failed(f"{peer.name} did not start; see {log}")
            for process in processes:
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
            told = [json.loads(process.communicate()[0]) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    seconds = [value for one in told for value in one["latencies"]]
    return Row(
        *(peer.name, setting.name, turn, callers, len(seconds)),
        rps=sum(len(one["latencies"]) / one["seconds"] for one in told),
        **latencies(seconds),
        cpu=1000 * sum(one["cpu"] for one in told) / max(1, len(seconds)),
    )


def _loop(place: Place, precision: str) -> list[str]:
    program = str(PROGRAMS / "in_process.py")
    return [sys.executable, program, str(place.out / "photos.json"), "--precision", precision]


def precision_of(peer: Peer, bundle: Path) -> str:
    """fp32, or what a service takes by default on a CPU."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    fastest = "int8" if "int8" in manifest["precisions"] else "fp32"
    return fastest if peer.precision == "default" else "fp32"
