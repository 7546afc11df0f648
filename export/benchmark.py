"""How fast the graphs run on this machine, and in what batches: measured, and only advice."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from serving.imaging import decode as images
from serving.imaging.preprocess import Pixels, Preprocess
from serving.inference.runtime import OnnxRuntime, Runtime
from serving.utils.cpu import cores
from serving.utils.progress import progress_bar

BATCHES: Final = (1, 2, 4, 8, 16)
DECODED: Final = (1, 2, 4, 8)
"""Batches that are measured between decoding, too."""
ROUNDS: Final = 3
SECONDS: Final = 0.25
"""Of one measurement; a round has one of every graph, split of the cores, and batch."""
WORTH: Final = 1.2
"""A batch above 1 makes requests wait for each other: it must be this much faster, and clearly more
than what a busy machine's rates differ by from one second to the next."""
ENOUGH: Final = 0.97
"""Of the best rate: the smallest batch that reaches it will do."""


class ThreadSetting(NamedTuple):
    """workers runs side by side, of so many threads each, of so many photos a batch.

    decoding: each worker decodes the photos of its batch first. A core that has decoded has lost
    the network from its cache, and fetches it again for one photo or for several: of that a graph
    which runs alone shows nothing.
    """

    workers: int
    threads: int
    batch: int
    decoding: bool = False


Rates = dict[str, dict[ThreadSetting, float]]
"""Of each graph: photos a second, the median over rounds."""


def measure(
    graphs: Mapping[str, Path],
    preprocess: Preprocess,
    photos: Sequence[bytes] = (),
    device: str = "cpu",
) -> Rates:
    """Run noise through every graph, in turns, in every setting; on a CPU decoded photos, too.

    On a CPU the cores are split into workers of one thread, and into one worker of all.
    """
    count, size = cores(), preprocess.size
    splits = sorted({(count, 1), (1, count)}) if device == "cpu" else [(1, 1)]
    noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), dtype=np.uint8)
    engines = {
        (name, threads): OnnxRuntime(path, device=device, threads=threads)
        for name, path in graphs.items()
        for _, threads in splits
    }
    measured: dict[str, dict[ThreadSetting, list[float]]] = {name: {} for name in graphs}
    settings = [ThreadSetting(*split, batch) for split in splits for batch in BATCHES]
    settings += (
        [ThreadSetting(1, 1, 1)] if ThreadSetting(1, 1, 1) not in settings else []
    )  # a lone photo
    if photos and device == "cpu":
        settings += [ThreadSetting(count, 1, batch, decoding=True) for batch in DECODED]

    def pixels(setting: ThreadSetting) -> Pixels:
        if not setting.decoding:
            return noise[: setting.batch]
        turn = itertools.islice(itertools.cycle(photos), setting.batch)
        decoded = (images.decode(photo, background=preprocess.background) for photo in turn)
        return np.stack([preprocess(found.image) for found in decoded])

    with progress_bar() as bar:
        task = bar.add_task("speed", total=ROUNDS * len(settings) * len(graphs))
        for _ in range(ROUNDS):
            for setting in settings:
                for name in graphs:
                    engine = engines[name, setting.threads]
                    rate = _rate(engine, partial(pixels, setting), setting)
                    measured[name].setdefault(setting, []).append(rate)
                    bar.advance(task)
    return {
        name: {setting: statistics.median(found) for setting, found in by.items()}
        for name, by in measured.items()
    }


def advice(rates: Rates) -> dict[str, Any]:
    """The tuning of one device, as the manifest has it: all that was measured, and the best of it.

    max_batch is the cap of the graph that is fastest: 1 unless a larger batch pays, between
    decoding where that was measured.
    """
    best = {name: fastest(by) for name, by in rates.items()}
    quickest = max(best, key=lambda name: rates[name][best[name]])
    return {
        "max_batch": _cap(rates[quickest]),
        "cores": cores(),
        "throughput": {
            name: {
                "workers": setting.workers,
                "threads": setting.threads,
                "batch": setting.batch,
                "images_per_second": _round(rates[name][setting]),
            }
            for name, setting in best.items()
        },
        "latency": {name: _latency(by) for name, by in rates.items()},
        "measured": [
            {"graph": name, **setting._asdict(), "images_per_second": _round(rate)}
            for name, by in rates.items()
            for setting, rate in by.items()
        ],
    }


def fastest(by: Mapping[ThreadSetting, float]) -> ThreadSetting:
    """The setting in which the graph alone does most photos a second."""
    return max((s for s in by if not s.decoding), key=lambda setting: by[setting])


def _cap(by: Mapping[ThreadSetting, float]) -> int:
    decoding = any(setting.decoding for setting in by)
    best = max((s for s in by if s.decoding is decoding), key=lambda setting: by[setting])
    if by[best] < WORTH * by[best._replace(batch=1)]:
        return 1
    alike = (s for s in by if s._replace(batch=best.batch) == best)
    return min(s.batch for s in alike if by[s] >= ENOUGH * by[best])


def _latency(by: Mapping[ThreadSetting, float]) -> dict[str, Any]:
    """Of a lone photo, with one thread and with all."""
    lone = [s for s in by if s.workers == s.batch == 1 and not s.decoding]
    best = max(lone, key=lambda setting: by[setting])
    return {"threads": best.threads, "ms": _round(1000 / by[best])}


def _rate(engine: Runtime, pixels: Callable[[], Pixels], setting: ThreadSetting) -> float:
    until = time.perf_counter() + SECONDS

    def work() -> int:
        photos = 0
        while True:
            engine.run(pixels())
            photos += setting.batch
            if time.perf_counter() >= until:
                return photos

    started = time.perf_counter()
    with ThreadPoolExecutor(setting.workers) as pool:
        done = [future.result() for future in [pool.submit(work) for _ in range(setting.workers)]]
    return sum(done) / (time.perf_counter() - started)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
