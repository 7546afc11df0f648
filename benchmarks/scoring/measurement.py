"""Measure one competitor in one setting: a short job and a long one, with checked answers."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import before, machine
from benchmarks.scoring import processes
from benchmarks.scoring.peers import REFERENCE, Peer, Setting
from benchmarks.scoring.photos import link
from benchmarks.scoring.processes import Usage

SHORT = 8
"""The short job has 1 / SHORT of the long job's photos."""


@dataclass(frozen=True)
class Context:
    """Settings that all measurements of one race share.

    Attributes:
        bundle: To score with.
        run: That it was exported from, if a peer needs it.
        network: Folder with the run's network for timm and transformers, if they take part.
        before: An older checkout, if one takes part.
        photos: All of them.
        turned: Those that are not stored upright.
        labels: By precision, the best label of each photo by path, computed by the bare loop from
            all of its pixels, turned upright.
        images: Number of photos of the long job.
        threads: Cores.
        peers_python: Interpreter of the peers' environment.
        batch: Batch size of the bare loop: Fledge's, from the bundle.
        out: Folder of the results.
    """

    bundle: Path
    run: Path | None
    network: Path | None
    before: before.Checkout | None
    photos: tuple[Path, ...]
    turned: frozenset[str]
    labels: Mapping[str, Mapping[str, str]]
    images: int
    threads: int
    peers_python: Path | None
    batch: int
    out: Path

    def precision(self, peer: Peer) -> str:
        """The precision of a competitor: `fp32` or `int8`."""
        if peer.precision != "default":
            return peer.precision
        older = self.before and peer.name in before.NAMES
        return fastest(self.before.bundle if self.before and older else self.bundle)


def fastest(bundle: Path) -> str:
    """The precision that `fledge score` chooses by default on a CPU."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    return "int8" if "int8" in manifest["precisions"] else "fp32"


@dataclass(frozen=True)
class Row:
    """Results of a measurement; a line of results.jsonl.

    Attributes:
        peer: Name of the competitor.
        setting: Name of its setting.
        round: Number of the round.
        images: Photos of the long job.
        seconds: Of the long job, from the start of its process to its end.
        cpu: Seconds of CPU time of the long job.
        short_images: Photos of the short job.
        short_seconds: Of the short job.
        short_cpu: Of the short job.
        peak: The most MB of the long job.
        others: Photos of the long job with another best label than the bare loop's.
        turned: Photos of the long job that are not stored upright.
        turned_others: Of these, those that count in `others`.
    """

    peer: str
    setting: str
    round: int
    images: int
    seconds: float
    cpu: float
    short_images: int
    short_seconds: float
    short_cpu: float
    peak: float
    others: int
    turned: int = 0
    turned_others: int = 0

    @property
    def answers(self) -> int:
        """Number of labels that were checked."""
        return self.images

    @property
    def rate(self) -> float:
        """Additional images of the long job per additional second: start and end cancel out."""
        return (self.images - self.short_images) / (self.seconds - self.short_seconds)

    @property
    def start(self) -> float:
        """Seconds of start and end: the extrapolated time of a job without photos."""
        return self.seconds - self.images / self.rate

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU time per additional image."""
        return 1000 * (self.cpu - self.short_cpu) / (self.images - self.short_images)


def measure(peer: Peer, setting: Setting, number: int, context: Context) -> Row:
    """Run both jobs.

    Raises:
        processes.Failed: A job failed, or wrote too few rows.
    """
    images = max(SHORT, round(context.images * peer.part))
    short, _ = job(peer, setting, images // SHORT, context)
    long, answers = job(peer, setting, images, context)
    expected = context.labels[context.precision(peer)]
    others = [photo for photo, label in answers if expected[photo] != label]
    return Row(
        *(peer.name, setting.name, number, images, long.seconds, long.cpu),
        *(images // SHORT, short.seconds, short.cpu, long.peak, len(others)),
        turned=sum(photo in context.turned for photo, _ in answers),
        turned_others=sum(photo in context.turned for photo in others),
    )


def job(
    peer: Peer, setting: Setting, images: int, context: Context
) -> tuple[Usage, list[tuple[str, str]]]:
    """Score `images` photos; returns the resources used, and (photo, best label) of each."""
    photos = link(list(context.photos), images, context.out / "photos" / str(images))
    number = peer.settings.index(setting) if setting in peer.settings else setting.name
    name = f"{peer.name}-setting{number}-{images}"
    out = context.out / "tables" / f"{name}.csv"
    shutil.rmtree(out.parent, ignore_errors=True)  # remove the table of an interrupted job
    out.parent.mkdir(parents=True)
    values = {
        **{"photos": photos, "out": out, "bundle": context.bundle, "run": context.run},
        **{
            "network": context.network,
            "threads": context.threads,
            "precision": context.precision(peer),
        },
        **{"python": sys.executable, "peers": context.peers_python, "batch": context.batch},
        **(context.before.values if context.before else {}),
    }
    log = context.out / "logs" / f"{name}.log"
    older = context.before and peer.name in before.NAMES
    env = machine.environment(context.before.folder if context.before and older else machine.ROOT)
    usage = processes.run(setting.filled(values), env, log)
    answers = read_table(out)
    if len(answers) != images:
        raise processes.Failed(f"{name} wrote {len(answers)} rows for {images} photos")
    return usage, answers


def read_table(path: Path) -> list[tuple[str, str]]:
    """(photo, best label) of each row; the photo is the target of its link."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(str(Path(row["path"]).resolve()), row["label"]) for row in csv.DictReader(file)]


def labels(context: Context, peer: Peer) -> dict[str, str]:
    """The bare loop's best label of each photo at the precision of `peer`; cached in `out`."""
    path = context.out / f"labels-{context.precision(peer)}.json"
    if not path.exists():
        _, answers = job(peer, REFERENCE, len(context.photos), context)
        path.write_text(json.dumps(dict(answers)))
    return dict(json.loads(path.read_text()))
