"""One competitor, one setting, one round: a short job and a long one, and every answer checked."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.scoring import photos as score_photos
from benchmarks.scoring import processes
from benchmarks.scoring.peers import ALL, Peer, Setting
from benchmarks.scoring.processes import Ran

SHORT = 8
"""The short job has this part of the long one's photos."""


@dataclass(frozen=True)
class Place:
    """What all measurements of one benchmark have in common.

    labels: the bare loop's best label of each photo, by precision. images: of the long job.
    network: the run's in the shapes of timm and transformers, where they take part.
    fastest: the precision that `default` stands for. batch: Fledge's own, as the bundle has it.
    """

    bundle: Path
    run: Path | None
    network: Path | None
    photos: tuple[Path, ...]
    labels: Mapping[str, Mapping[str, str]]
    images: int
    threads: int
    peers_python: Path | None
    fastest: str
    batch: int
    out: Path

    def precision(self, peer: Peer) -> str:
        """The one that a competitor is asked for, or has by default."""
        return self.fastest if peer.precision == "default" else peer.precision


@dataclass(frozen=True)
class Row:
    """What came out; a line of results.jsonl.

    images, seconds, cpu: of the long job, from the start of its process to its end; `short_` of
    the short one. cpu: seconds of the processor. peak: MB, of the long job. others: answers whose
    best label is not that of the bare loop.
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

    @property
    def rate(self) -> float:
        """Images a second, of those that the long job has more: starting and ending cancel out."""
        return (self.images - self.short_images) / (self.seconds - self.short_seconds)

    @property
    def start(self) -> float:
        """Seconds of a job without photos: what starting and ending take."""
        return self.seconds - self.images / self.rate

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of the processor for one more image."""
        return 1000 * (self.cpu - self.short_cpu) / (self.images - self.short_images)


def measure(peer: Peer, setting: Setting, turn: int, place: Place) -> Row:
    """Run both jobs.

    Raises:
        score_process.Failed: One ended with an error, or gave too few answers.
    """
    images = max(SHORT, round(place.images * peer.part))
    short, _ = job(peer, setting, images // SHORT, place)
    long, answers = job(peer, setting, images, place)
    known = place.labels[place.precision(peer)]
    others = sum(known[photo] != label for photo, label in answers)
    return Row(
        *(peer.name, setting.name, turn, images, long.seconds, long.cpu),
        *(images // SHORT, short.seconds, short.cpu, long.peak, others),
    )


def job(
    peer: Peer, setting: Setting, images: int, place: Place
) -> tuple[Ran, list[tuple[str, str]]]:
    """Score so many photos: what it took, and photo and best label of each."""
    photos = score_photos.linked(list(place.photos), images, place.out / "photos" / str(images))
    name = f"{peer.name}-setting{peer.settings.index(setting)}-{images}"
    out = place.out / "tables" / f"{name}.csv"
    shutil.rmtree(out.parent, ignore_errors=True)  # what an interrupted one has left is not used
    out.parent.mkdir(parents=True)
    values = {
        **{"photos": photos, "out": out, "bundle": place.bundle, "run": place.run},
        **{"network": place.network, "threads": place.threads, "precision": place.precision(peer)},
        **{"python": sys.executable, "peers": place.peers_python, "batch": place.batch},
    }
    log = place.out / "logs" / f"{name}.log"
    ran = processes.run(setting.filled(values), machine.environment(), log)
    answers = table(out)
    if len(answers) != images:
        raise processes.Failed(f"{name} gave {len(answers)} answers for {images} photos")
    return ran, answers


def table(path: Path) -> list[tuple[str, str]]:
    """Photo and best label of each row, the photo by what its link points at."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(str(Path(row["path"]).resolve()), row["label"]) for row in csv.DictReader(file)]


def labels(place: Place, peer: Peer) -> dict[str, str]:
    """The bare loop's best label of each photo, at the precision of `peer`; kept in `out`."""
    path = place.out / f"labels-{place.precision(peer)}.json"
    if not path.exists():
        bare = ALL["limit" if peer.precision == "default" else "limit-fp32"]
        _, answers = job(bare, bare.settings[0], len(place.photos), place)
        path.write_text(json.dumps(dict(answers)))
    return dict(json.loads(path.read_text()))
