"""Measure one competitor in one setting: start it, send load, check its answers."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks import before, machine
from benchmarks.machine import PEERS_FOLDER
from benchmarks.serving.load_generator import Load, Window, percentile
from benchmarks.serving.peers import Peer, Setting
from benchmarks.serving.photos import requests
from benchmarks.serving.processes import Failed, Meter, free_port, serving

ROUTE: Final = "/predict"


@dataclass(frozen=True)
class Context:
    """Settings that all measurements of one race share.

    labels: By precision, the best label of each photo, computed in process from all of its pixels,
        turned upright. turned: The photos that are not stored upright. before: An older checkout,
        if one takes part.
    """

    bundle: Path
    run: Path | None
    before: before.Checkout | None
    photos: tuple[Path, ...]
    turned: frozenset[int]
    labels: Mapping[str, Sequence[str]]
    callers: tuple[int, ...]
    threads: int
    seconds: float
    warm: float
    peers_python: Path
    out: Path

    def precision(self, peer: Peer) -> str:
        """fp32, or the precision that `fledge serve` chooses by default on a CPU."""
        older = self.before and peer.name in before.NAMES
        bundle = self.before.bundle if self.before and older else self.bundle
        return precision_of(peer, bundle)


@dataclass(frozen=True)
class Row:
    """Results with one number of callers; a line of results.jsonl.

    Attributes:
        peer: Name of the competitor.
        setting: Name of its setting.
        round: Number of the round.
        callers: Concurrent callers; of the in-process limit, processes.
        answers: Number of answers with status 200.
        rps: Those answers per second.
        p50: Median latency in ms.
        p99: 99th percentile of the latency in ms.
        cpu: ms of CPU time per answer, of all server processes.
        own_cpu: ms of CPU time per answer, of the callers.
        rest: MB of memory when the server was ready.
        peak: The most MB.
        errors: Requests without an answer of status 200.
        others: Answers of status 200 with another best label than computed in process.
        start: Seconds until the server was ready.
        turned: Answers of status 200 to photos that are not stored upright.
        turned_others: Of these, those that count in `others`.
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
    turned: int = 0
    turned_others: int = 0


def measure(peer: Peer, setting: Setting, number: int, context: Context) -> list[Row]:
    """Measure with each number of callers; returns a row for each.

    Raises:
        Failed: The server did not become ready, or gave no answer of status 200.
    """
    index = peer.settings.index(setting)
    log = context.out / "logs" / f"{peer.name}-setting{index}-round{number}.log"
    if peer.limit:
        return [
            _measure_limit(peer, setting, number, callers, context, log)
            for callers in context.callers
        ]
    port = free_port()
    values = {
        **{"port": port, "bundle": context.bundle, "threads": context.threads},
        **{"python": sys.executable, "peers": context.peers_python},
        **(context.before.values if context.before else {}),
    }
    command, variables = setting.filled(values)
    env = {**environment(context), **variables}
    bodies = requests(context.photos, port, ROUTE, peer.form)
    labels = context.labels[context.precision(peer)]
    rows = []
    with serving(command, env, port, peer.ready, log) as server:
        rest = Meter(server.pid).rest
        for callers in context.callers:
            meter = Meter(server.pid)
            load = Load(port, bodies)
            window = uvloop.run(load.run(callers, context.warm, context.seconds, meter))
            good = [answer for answer in window.answers if answer.status == 200]
            if not good:
                raise Failed(f"{peer.name} gave no answer of status 200; see {log}")
            others = [best_label(answer.body) != labels[answer.photo] for answer in good]
            turned = [answer.photo in context.turned for answer in good]
            rows.append(
                Row(
                    *(peer.name, setting.name, number, callers, len(good)),
                    rps=len(good) / window.seconds,
                    **latencies([answer.seconds for answer in good]),
                    cpu=1000 * meter.cpu / max(1, len(good)),
                    own_cpu=1000 * window.own_cpu / max(1, len(good)),
                    rest=rest,
                    peak=meter.peak,
                    errors=errors(window),
                    others=sum(others),
                    start=server.seconds,
                    turned=sum(turned),
                    turned_others=sum(map(operator.and_, others, turned)),
                )
            )
    return rows


def environment(context: Context) -> dict[str, str]:
    """Environment variables of every server."""
    return {
        **machine.environment(),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(context.out / "bentoml"),
        "PEER_BUNDLE": str(context.bundle),
        "PEER_RUN": str(context.run or ""),
    }


def errors(window: Window) -> int:
    """Number of requests without an answer of status 200."""
    return window.lost + sum(answer.status != 200 for answer in window.answers)


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    return {f"p{share}": 1000 * percentile(seconds, share / 100) for share in (50, 99)}


def best_label(body: bytes) -> str:
    """The first predicted label, or "" if there is none; a batchable service returns a list."""
    try:
        answer = json.loads(body)
        first = answer[0] if isinstance(answer, list) else answer
        return str(first["predictions"][0]["label"])
    except (ValueError, LookupError, TypeError):
        return ""


def labels_of(context: Context, precision: str) -> list[str]:
    """The best label of each photo, computed in process from all of its pixels."""
    done = subprocess.run(
        [*_loop(context, precision), "--labels"],
        env=environment(context),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout))


def _measure_limit(
    peer: Peer, setting: Setting, number: int, callers: int, context: Context, log: Path
) -> Row:
    """Run the in-process loop: a single-threaded process per caller, at most one per core."""
    count = min(callers, context.threads)
    command = [
        *_loop(context, context.precision(peer)),
        *("--warm", str(context.warm), "--seconds", str(context.seconds)),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    outputs: list[dict[str, Any]] = []
    with log.open("w") as out:
        processes = [
            subprocess.Popen(
                command,
                env=environment(context),
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
                    raise Failed(f"{peer.name} did not start; see {log}")
            for process in processes:
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
            outputs = [json.loads(process.communicate()[0]) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    seconds = [value for output in outputs for value in output["latencies"]]
    return Row(
        *(peer.name, setting.name, number, callers, len(seconds)),
        rps=sum(len(output["latencies"]) / output["seconds"] for output in outputs),
        **latencies(seconds),
        cpu=1000 * sum(output["cpu"] for output in outputs) / max(1, len(seconds)),
    )


def _loop(context: Context, precision: str) -> list[str]:
    program = str(PEERS_FOLDER / "in_process.py")
    return [sys.executable, program, str(context.out / "photos.json"), "--precision", precision]


def precision_of(peer: Peer, bundle: Path) -> str:
    """fp32, or the precision that `fledge serve` chooses by default on a CPU."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    fastest = "int8" if "int8" in manifest["precisions"] else "fp32"
    return fastest if peer.precision == "default" else "fp32"
