"""What the export measured of speed: how runs of the graph share the cores of a CPU."""

from __future__ import annotations

from typing import NamedTuple

from serving.bundle.manifest import Manifest


class Parallelism(NamedTuple):
    """runs: how many go at a time; threads: of each."""

    runs: int
    threads: int


def measured_parallelism(manifest: Manifest, precision: str, cores: int) -> Parallelism:
    """What gave the most images a second at export, if that had as many cores.

    Where it had others, or nothing was measured: a run of one thread for each core.
    """
    tuned = manifest.tuning.get("cpu", {})
    best = tuned.get("throughput", {}).get(precision)
    if best is None or tuned.get("cores") != cores:
        return Parallelism(cores, 1)
    return Parallelism(int(best["workers"]), int(best["threads"]))


def multithreading_pays(manifest: Manifest, precision: str, cores: int) -> bool:
    """Whether a lone image is answered sooner by several cores.

    Yes, unless the export measured on as many that it isn't.
    """
    tuned = manifest.tuning.get("cpu", {})
    found = tuned.get("latency", {}).get(precision)
    return found is None or tuned.get("cores") != cores or int(found["threads"]) > 1
