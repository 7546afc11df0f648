"""What memory a long scoring job takes: beyond the model's, and from its beginning to its end."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import machine
from benchmarks.scoring import photos as score_photos
from benchmarks.scoring import processes
from benchmarks.scoring.peers import ALL
from benchmarks.scoring.processes import Ran
from benchmarks.scoring.run import Place

TENTHS = 10
_MODEL = """
import sys
from pathlib import Path
import psutil
from serving.scoring import score
from serving.inference.load import open_predictor
predictor = open_predictor(Path(sys.argv[1]), device="cpu")
print(psutil.Process().memory_info().rss / 1e6)
"""


def measure(place: Place, images: int) -> str:
    """Score so many photos by `fledge score` as it comes; a table of the memory on the way.

    Raises:
        score_process.Failed: It ended with an error.
    """
    model = _model(place)
    peer = ALL["fledge"]
    photos = score_photos.linked(list(place.photos), images, place.out / "photos" / str(images))
    out = place.out / "memory.csv"
    values = {"python": sys.executable, "photos": photos, "bundle": place.bundle, "out": out}
    command = [*peer.settings[0].filled(values), "--restart"]
    log = place.out / "logs" / "memory.log"
    ran = processes.run(command, machine.environment(), log)
    with out.open(encoding="utf-8") as file:
        rows = sum(1 for _ in file) - 1
    if rows != images:
        raise processes.Failed(f"{rows} rows for {images} photos; see {log}")
    return told(ran, model, images)


def told(ran: Ran, model: float, images: int) -> str:
    """In words, and as a table: the most memory in each tenth of the time."""
    tenths = by_tenths(ran.memory)
    heads = " | ".join(f"{10 * (number + 1)} %" for number in range(TENTHS))
    sizes = " | ".join(f"{size:.0f}" for size in tenths)
    grown = statistics.median(tenths[-3:]) - statistics.median(tenths[1:4])
    return "\n".join(
        [
            f"{images} photos in {ran.seconds:.0f} s, {images / ran.seconds:.0f} images/s from "
            f"start to end. The model alone takes {model:.0f} MB; the job {ran.peak:.0f} MB at "
            f"most, {ran.peak - model:.0f} MB more. From the beginning to the end it grew by "
            f"{grown:.0f} MB.",
            "",
            f"| of the time | {heads} |",
            f"|---|{'---:|' * TENTHS}",
            f"| MB at most | {sizes} |",
        ]
    )


def by_tenths(memory: Sequence[tuple[float, float]]) -> list[float]:
    """The most memory in each tenth of the time; that of the one before where nobody looked."""
    end = memory[-1][0]
    found: list[float] = []
    for number in range(TENTHS):
        low, high = number * end / TENTHS, (number + 1) * end / TENTHS
        sizes = [size for at, size in memory if low <= at <= high]
        found.append(max(sizes) if sizes else found[-1])
    return found


def _model(place: Place) -> float:
    """MB of a process that has opened the bundle, and scores nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _MODEL, str(place.bundle)],
        env=machine.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
