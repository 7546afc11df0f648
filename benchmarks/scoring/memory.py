"""Memory of a long scoring job: compared with the model alone, and over time."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import machine
from benchmarks.scoring.measurement import Context
from benchmarks.scoring.peers import PEERS
from benchmarks.scoring.photos import link
from benchmarks.scoring.processes import Failed, Usage, run

TENTHS = 10
# `score` is imported so that both processes have loaded the same modules.
_LOAD_MODEL = """
import sys
from pathlib import Path
import psutil
from serving.scoring import score
from serving.inference.load import open_predictor
predictor = open_predictor(Path(sys.argv[1]), device="cpu")
print(psutil.Process().memory_info().rss / 1e6)
"""


def measure(context: Context, images: int) -> str:
    """Score `images` photos by `fledge score` with default options; returns the report.

    Raises:
        Failed: The command failed, or wrote too few rows.
    """
    model = _model_memory(context)
    peer = PEERS["fledge"]
    photos = link(list(context.photos), images, context.out / "photos" / str(images))
    out = context.out / "memory.csv"
    values = {"python": sys.executable, "photos": photos, "bundle": context.bundle, "out": out}
    command = [*peer.settings[0].filled(values), "--restart"]
    log = context.out / "logs" / "memory.log"
    usage = run(command, machine.environment(), log)
    with out.open(encoding="utf-8") as file:
        rows = sum(1 for _ in file) - 1
    if rows != images:
        raise Failed(f"{rows} rows for {images} photos; see {log}")
    return report(usage, model, images)


def report(usage: Usage, model: float, images: int) -> str:
    """A summary, and a table of the peak memory in each tenth of the time. model: in MB."""
    tenths = by_tenths(usage.memory)
    heads = " | ".join(f"{10 * (number + 1)} %" for number in range(TENTHS))
    sizes = " | ".join(f"{size:.0f}" for size in tenths)
    grown = statistics.median(tenths[-3:]) - statistics.median(tenths[1:4])
    return "\n".join(
        [
            f"{images} photos in {usage.seconds:.0f} s, {images / usage.seconds:.0f} images/s "
            f"including start and end. A process with the model alone takes {model:.0f} MB; the "
            f"job takes {usage.peak:.0f} MB at most, {usage.peak - model:.0f} MB more. Its memory "
            f"grew by {grown:.0f} MB from start to end.",
            "",
            f"| of the time | {heads} |",
            f"|---|{'---:|' * TENTHS}",
            f"| MB at most | {sizes} |",
        ]
    )


def by_tenths(memory: Sequence[tuple[float, float]]) -> list[float]:
    """Peak MB in each tenth of the time; a tenth without samples has the value before it."""
    end = memory[-1][0]
    peaks: list[float] = []
    for number in range(TENTHS):
        low, high = number * end / TENTHS, (number + 1) * end / TENTHS
        sizes = [size for at, size in memory if low <= at <= high]
        peaks.append(max(sizes) if sizes else peaks[-1])
    return peaks


def _model_memory(context: Context) -> float:
    """MB of a process that has loaded the bundle's model and scored nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_MODEL, str(context.bundle)],
        env=machine.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
