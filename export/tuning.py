"""How fast the graphs run on this machine, and in what batches: measured, and only advice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from serving.cores import cores
from serving.preprocess import Pixels
from serving.progress import progress_bar
from serving.runtime import OnnxRuntime, Runtime

BATCHES: Final = (1, 2, 4, 8, 16)
ROUNDS: Final = 3
SECONDS: Final = 0.25
"""Of one measurement; a round has one of every graph, split of the cores, and batch."""
WORTH: Final = 1.1
"""A batch above 1 makes requests wait for each other: it must be this much faster."""


class Setting(NamedTuple):
    """workers runs side by side, of so many threads each, of so many photos a batch."""

    workers: int
    threads: int
    batch: int


Rates = dict[str, dict[Setting, float]]
"""Of each graph: photos a second, the median over rounds."""


def measure(graphs: Mapping[str, Path], size: int, device: str = "cpu") -> Rates:
    """Run noise of `size` pixels through every graph, in turns, in every setting.

    On a CPU the cores are split into workers of one thread, and into one worker of all.
    """
    count = cores()
    splits = sorted({(count, 1), (1, count)}) if device == "cpu" else [(1, 1)]
    noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), dtype=np.uint8)
    engines = {
        (name, threads): OnnxRuntime(path, device=device, threads=threads)
        for name, path in graphs.items()
        for _, threads in splits
    }
    measured: dict[str, dict[Setting, list[float]]] = {name: {} for name in graphs}
    settings = [Setting(*split, batch) for split in splits for batch in BATCHES]
    settings += [Setting(1, 1, 1)] if Setting(1, 1, 1) not in settings else []  # a lone photo
    with progress_bar() as bar:
        task = bar.add_task("speed", total=ROUNDS * len(settings) * len(graphs))
        for _ in range(ROUNDS):
            for setting in settings:
                for name in graphs:
                    rate = _rate(engines[name, setting.threads], noise, setting)
                    measured[name].setdefault(setting, []).append(rate)
                    bar.advance(task)
    return {
        name: {setting: statistics.median(found) for setting, found in by.items()}
        for name, by in measured.items()
    }


def advice(rates: Rates) -> dict[str, Any]:
    """The tuning of one device, as the manifest has it: all that was measured, and the best of it.

    max_batch is the cap of the graph that is fastest: 1 unless a larger batch pays.
    """
    best = {name: fastest(by) for name, by in rates.items()}
    quickest = max(best, key=lambda name: rates[name][best[name]])
    return {
        "max_batch": _cap(rates[quickest]),
        "cores": cores(),
        "throughput": {
            name: {**setting._asdict(), "images_per_second": _round(rates[name][setting])}
            for name, setting in best.items()
        },
        "latency": {name: _latency(by) for name, by in rates.items()},
        "measured": [
            {"graph": name, **setting._asdict(), "images_per_second": _round(rate)}
            for name, by in rates.items()
            for setting, rate in by.items()
        ],
    }


def fastest(by: Mapping[Setting, float]) -> Setting:
    """The setting of most photos a second."""
    return max(by, key=lambda setting: by[setting])


def _cap(by: Mapping[Setting, float]) -> int:
    best = fastest(by)
    return best.batch if by[best] >= WORTH * by[best._replace(batch=1)] else 1


def _latency(by: Mapping[Setting, float]) -> dict[str, Any]:
    """Of a lone photo, with one thread and with all."""
    best = max((s for s in by if s.workers == s.batch == 1), key=lambda setting: by[setting])
    return {"threads": best.threads, "ms": _round(1000 / by[best])}


def _rate(engine: Runtime, noise: Pixels, setting: Setting) -> float:
    pixels = noise[: setting.batch]
    until = time.perf_counter() + SECONDS

    def work() -> int:
        photos = 0
        while True:
            engine.run(pixels)
            photos += setting.batch
            if time.perf_counter() >= until:
                return photos

    started = time.perf_counter()
    with ThreadPoolExecutor(setting.workers) as pool:
        done = [future.result() for future in [pool.submit(work) for _ in range(setting.workers)]]
    return sum(done) / (time.perf_counter() - started)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
