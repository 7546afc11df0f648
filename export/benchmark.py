"""Measure the exported graphs' images per second on this machine, by thread count and batch size.

The measurements and the settings derived from them are stored in the manifest's `tuning` entry. A
service uses these settings unless its own options override them.
"""

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

from serving.imaging.decode import decode
from serving.imaging.preprocess import Pixels, Preprocess
from serving.inference.runtime import OnnxRuntime, Runtime
from serving.utils.cpu import cores
from serving.utils.progress import progress_bar

BATCHES: Final = (1, 2, 4, 8, 16)
DECODING_BATCHES: Final = (1, 2, 4, 8)
"""Batch sizes that are also measured with decoding in the loop."""
ROUNDS: Final = 3
SECONDS: Final = 0.25
"""Length of one measurement; a round measures every graph in every setting once."""
MIN_SPEEDUP: Final = 1.2
"""Required speedup of a batch size above 1 over size 1.

A smaller gain is not worth a batch, because requests of a batch wait for each other, and because
rates differ from one second to the next on a busy machine.
"""
NEAR_BEST: Final = 0.97
"""The smallest batch size that reaches this share of the best rate is chosen."""


class ThreadSetting(NamedTuple):
    """A combination of thread counts and batch size to measure.

    Attributes:
        workers: Number of threads that run the graph concurrently.
        threads: Number of intra-op threads of each run.
        batch: Number of images per run.
        decoding: Whether each worker decodes the images of a batch before it runs the graph.
            Decoding evicts the weights from the core's cache, and a batch loads them once for
            several images. A benchmark of the graph alone does not show this advantage of batches.
    """

    workers: int
    threads: int
    batch: int
    decoding: bool = False


Rates = dict[str, dict[ThreadSetting, float]]
"""Images per second by graph and setting: the median over the rounds."""


def measure(
    graphs: Mapping[str, Path],
    preprocess: Preprocess,
    photos: Sequence[bytes] = (),
    device: str = "cpu",
    *,
    sizes: Mapping[str, int] | None = None,
) -> Rates:
    """Measure the images per second of every graph in every thread and batch setting.

    Each of several rounds measures all graphs once, and the median is returned. The input is noise.
    On a CPU, two ways to use the cores are measured: one worker per core with one thread each, and
    one worker with a thread for every core. Some settings also decode `photos` (encoded images).
    `sizes` has the side of each graph's input, if they differ; such graphs take no `photos`.
    """
    count, sides = cores(), sizes or dict.fromkeys(graphs, preprocess.size)
    splits = sorted({(count, 1), (1, count)}) if device == "cpu" else [(1, 1)]
    random = np.random.default_rng(0)
    noise = {
        side: random.integers(0, 256, (max(BATCHES), side, side, 3), dtype=np.uint8)
        for side in set(sides.values())
    }
    engines = {
        (name, threads): OnnxRuntime(path, device=device, threads=threads)
        for name, path in graphs.items()
        for _, threads in splits
    }
    measured: dict[str, dict[ThreadSetting, list[float]]] = {name: {} for name in graphs}
    settings = [ThreadSetting(*split, batch) for split in splits for batch in BATCHES]
    single = ThreadSetting(1, 1, 1)  # one request at a time
    settings += [] if single in settings else [single]
    if photos and device == "cpu":
        settings += [ThreadSetting(count, 1, batch, decoding=True) for batch in DECODING_BATCHES]

    def pixels(name: str, setting: ThreadSetting) -> Pixels:
        if not setting.decoding:
            return noise[sides[name]][: setting.batch]
        batch = itertools.islice(itertools.cycle(photos), setting.batch)
        decoded = (decode(photo, preprocess=preprocess) for photo in batch)
        return np.stack([preprocess(one.image, one.area) for one in decoded])

    with progress_bar() as bar:
        task = bar.add_task("speed", total=ROUNDS * len(settings) * len(graphs))
        for _ in range(ROUNDS):
            for setting in settings:
                for name in graphs:
                    engine = engines[name, setting.threads]
                    rate = _rate(engine, partial(pixels, name, setting), setting)
                    measured[name].setdefault(setting, []).append(rate)
                    bar.advance(task)
    return {
        name: {setting: statistics.median(rounds) for setting, rounds in by_setting.items()}
        for name, by_setting in measured.items()
    }


def advice(rates: Rates) -> dict[str, Any]:
    """Return the manifest's `tuning` entry of one device: the best settings and all measurements.

    The entry's `max_batch` is the best batch size of the fastest graph. It is 1 unless a larger
    batch is clearly faster. If rates with decoding were measured, `max_batch` is based on them.
    """
    best = {name: fastest(by_setting) for name, by_setting in rates.items()}
    fastest_graph = max(best, key=lambda name: rates[name][best[name]])
    return {
        "max_batch": _max_batch(rates[fastest_graph]),
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
        "latency": {name: _latency(by_setting) for name, by_setting in rates.items()},
        "measured": [
            {"graph": name, **setting._asdict(), "images_per_second": _round(rate)}
            for name, by_setting in rates.items()
            for setting, rate in by_setting.items()
        ],
    }


def fastest(rates: Mapping[ThreadSetting, float]) -> ThreadSetting:
    """Return the setting with the highest rate among those without decoding."""
    return max((s for s in rates if not s.decoding), key=lambda setting: rates[setting])


def _max_batch(rates: Mapping[ThreadSetting, float]) -> int:
    decoding = any(setting.decoding for setting in rates)
    best = max((s for s in rates if s.decoding is decoding), key=lambda setting: rates[setting])
    if rates[best] < MIN_SPEEDUP * rates[best._replace(batch=1)]:
        return 1
    same_split = (s for s in rates if s._replace(batch=best.batch) == best)
    return min(s.batch for s in same_split if rates[s] >= NEAR_BEST * rates[best])


def _latency(rates: Mapping[ThreadSetting, float]) -> dict[str, Any]:
    """Return the faster number of threads for a single image, and the time in milliseconds.

    A run with one thread is compared with a run with a thread for every CPU core.
    """
    single = [s for s in rates if s.workers == s.batch == 1 and not s.decoding]
    best = max(single, key=lambda setting: rates[setting])
    return {"threads": best.threads, "ms": _round(1000 / rates[best])}


def _rate(engine: Runtime, pixels: Callable[[], Pixels], setting: ThreadSetting) -> float:
    until = time.perf_counter() + SECONDS

    def work() -> int:
        images = 0
        while True:
            engine.run(pixels())
            images += setting.batch
            if time.perf_counter() >= until:
                return images

    started = time.perf_counter()
    with ThreadPoolExecutor(setting.workers) as pool:
        done = [future.result() for future in [pool.submit(work) for _ in range(setting.workers)]]
    return sum(done) / (time.perf_counter() - started)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
