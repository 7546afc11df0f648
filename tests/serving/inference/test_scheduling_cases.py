"""Cases of the two engines: what is measured, how many threads run, and how they end."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serving.errors import Overloaded
from serving.imaging.cost import Cost
from serving.inference import dynamic_batcher, scheduling
from serving.inference.admission import EXTRA_THREADS, QueueLimit
from serving.inference.decoding import DecodingBudget
from serving.inference.dynamic_batcher import DynamicBatcher
from serving.inference.predictor import Prediction, Prepared
from serving.inference.scheduling import PerImageEngine, build_engine


class FakePredictor:
    """The probability is the number of bytes, the width of the pixels is the limit of pixels."""

    def __init__(self, provider: str = "CPUExecutionProvider") -> None:
        self.runtime = SimpleNamespace(provider=provider)
        self.calls: list[tuple[int, bool]] = []

    def estimate(self, data: bytes, tta: int, *, max_pixels: int) -> Cost:
        return Cost(1, 1, 1, 0.1)

    def prepare(
        self, data: bytes, tta: int = 0, *, max_pixels: int, estimated: Cost | None = None
    ) -> Prepared:
        return Prepared(np.full((max(1, tta), 1, max_pixels, 3), len(data), np.uint8), ())

    def predict(
        self, prepared: list[Prepared], *, low_latency: bool, max_rows: int
    ) -> list[Prediction]:
        self.calls.append((len(prepared), low_latency))
        return [
            Prediction(np.array(item.pixels.shape[:3]), np.zeros(1), 0.0, len(item.pixels), ())
            for item in prepared
        ]


def built(
    predictor: FakePredictor, cap: int, observe: Any = lambda *_: None, **options: Any
) -> Any:
    settings = {
        "threads": 2,
        "max_queue": 3,
        "max_pixels": 7,
        "budget": DecodingBudget.of(2**20),
    } | options
    return build_engine(predictor, cap=cap, observe=observe, **settings)  # type: ignore[arg-type]


def names(engine: Any) -> list[str]:
    threads = engine._threads if isinstance(engine, PerImageEngine) else engine._runners
    assert all(thread.daemon and thread.is_alive() for thread in threads)
    return [thread.name for thread in threads]


@pytest.mark.parametrize(
    ("cap", "provider", "threads"),
    [
        (1, "CPUExecutionProvider", [f"fledge-image-{n}" for n in range(3 + EXTRA_THREADS)]),
        (1, "CUDAExecutionProvider", [f"fledge-image-{n}" for n in range(3 + EXTRA_THREADS)]),
        (2, "CPUExecutionProvider", [f"fledge-infer-{n}" for n in range(3)]),
        (8, "CUDAExecutionProvider", ["fledge-infer-0"]),
    ],
)
def test_the_engine_fits_the_cap_and_the_device(
    cap: int, provider: str, threads: list[str]
) -> None:
    predictor = FakePredictor(provider)
    engine = built(predictor, cap, threads=3)
    try:
        assert isinstance(engine, PerImageEngine if cap == 1 else DynamicBatcher)
        assert names(engine) == threads

        async def work() -> None:
            found = await engine.predict(b"x", 2)
            assert (found.views, found.probabilities.tolist()) == (2, [2, 1, 7])
            assert (await engine.predict(b"x")).views == 1
            full = [engine.predict(b"x") for _ in range(4)]
            outcomes = await asyncio.gather(*full, return_exceptions=True)
            refused = [one for one in outcomes if isinstance(one, Overloaded)]
            assert [str(one) for one in refused] == [
                "3 images are waiting already; ask again in a second"
            ]

        asyncio.run(asyncio.wait_for(work(), 20))
        if cap > 1:
            assert engine._decoders._max_workers == 3
            assert {t.name for t in threading.enumerate()} >= {"fledge-decode_0"}
    finally:
        alive = list(engine._threads if cap == 1 else engine._runners)
        engine.close()
    assert not any(thread.is_alive() for thread in alive)


def run_held(engine: DynamicBatcher, views: tuple[int, ...]) -> None:
    """Predict images of so many views that are all decoded while the graph runs for another."""
    held = threading.Event()
    ready, predict = threading.Event(), engine._predict

    def hold(prepared: list[Prepared], *, low_latency: bool) -> list[Prediction]:
        ready.set()
        assert held.wait(10)
        return predict(prepared, low_latency=low_latency)

    engine._predict = hold

    async def work() -> None:
        first = asyncio.create_task(engine.predict(b"x"))
        await asyncio.to_thread(ready.wait, 10)
        rest = [asyncio.create_task(engine.predict(b"x", own)) for own in views]
        while len(engine._ready) < len(views):
            await asyncio.sleep(0.001)
        held.set()
        await asyncio.gather(first, *rest)

    try:
        asyncio.run(asyncio.wait_for(work(), 20))
    finally:
        held.set()
        engine.close()


def test_a_batch_runs_up_to_its_cap() -> None:
    predictor = FakePredictor()
    run_held(built(predictor, 3, max_queue=9, threads=1), (1, 2, 1, 1, 1, 3))
    assert [count for count, _ in predictor.calls] == [1, 2, 3, 1]


def test_only_images_of_a_batch_that_have_no_prediction_are_repeated() -> None:
    predictor = FakePredictor()
    engine = built(predictor, 3, max_queue=9, threads=1)
    predict = engine._predict

    def lose(prepared: list[Prepared], *, low_latency: bool) -> list[Prediction]:
        found = predict(prepared, low_latency=low_latency)
        return found[:1] if len(found) == 3 else found

    engine._predict = lose
    run_held(engine, (1, 1, 1))
    assert [count for count, _ in predictor.calls] == [1, 3, 1, 1]


@pytest.mark.parametrize("cap", [1, 4])
def test_each_phase_is_measured_from_its_own_start(
    monkeypatch: pytest.MonkeyPatch, cap: int
) -> None:
    """A clock that advances by 1, 2, 4, … at each reading tells which readings are compared."""
    ticks = itertools.accumulate((2.0**n for n in range(40)), initial=0.0)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=time.monotonic)
    for module in (scheduling, dynamic_batcher):
        monkeypatch.setattr(module, "time", clock)
    seen: list[tuple[str, float]] = []
    engine = built(FakePredictor(), cap, lambda *found: seen.append(found))
    try:
        asyncio.run(asyncio.wait_for(engine.predict(b"x", 3), 20))
    finally:
        engine.close()
    assert (seen[0], seen[-1]) == (("waiting", 1), ("waiting", 0))
    if cap == 1:  # queued, started, decoded, done
        phases = [("queue", 1.0), ("decode", 2.0), ("infer", 4.0), ("rows", 3)]
    else:  # started, decoded and queued, taken from the queue, done
        phases = [("decode", 1.0), ("rows", 3), ("queue", 2.0), ("infer", 4.0)]
    assert seen[1:-1] == phases


def test_the_queue_counts_images_whatever_becomes_of_them() -> None:
    seen: list[tuple[str, float]] = []
    limit = QueueLimit(2, lambda *found: seen.append(found))
    assert (limit.limit, limit.count) == (2, 0)
    with limit.admit():
        assert limit.count == 1
        with suppress(KeyError), limit.admit():
            assert limit.count == 2
            with pytest.raises(Overloaded), limit.admit():
                pytest.fail("admitted")
            raise KeyError
        assert limit.count == 1
    assert limit.count == 0
    assert seen == [("waiting", count) for count in (1, 2, 1, 0)]


@pytest.mark.parametrize("cap", [1, 4])
def test_the_only_image_in_progress_has_low_latency(cap: int) -> None:
    predictor = FakePredictor()
    engine = built(predictor, cap)
    try:
        for _ in range(2):
            asyncio.run(asyncio.wait_for(engine.predict(b"x"), 20))
    finally:
        engine.close()
    assert predictor.calls == [(1, True), (1, True)]


@pytest.mark.parametrize("cap", [1, 4])
def test_a_missing_prediction_is_an_error_of_its_image(cap: int) -> None:
    engine = built(FakePredictor(), cap)
    predict = engine._predict
    engine._predict = lambda prepared, **options: predict(prepared, **options)[:-1]

    async def work() -> None:
        with pytest.raises((ValueError, IndexError)):
            await engine.predict(b"x")
        engine._predict = predict
        assert (await engine.predict(b"x")).views == 1

    try:
        asyncio.run(asyncio.wait_for(work(), 20))
    finally:
        engine.close()


def test_a_batcher_that_is_closed_decodes_no_waiting_image() -> None:
    engine = built(FakePredictor(), 2, max_queue=9, threads=1)
    decoding, held, prepare = threading.Event(), threading.Event(), engine._decoder.prepare
    decoded: list[bytes] = []

    def hold(data: bytes, tta: int) -> Prepared:
        decoding.set()
        assert held.wait(20)
        decoded.append(data)
        return prepare(data, tta)

    engine._decoder = engine._decoder._replace(prepare=hold)

    async def work() -> None:
        calls = [asyncio.create_task(engine.predict(data)) for data in (b"a", b"b", b"c")]
        await asyncio.to_thread(decoding.wait, 10)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        held.set()
        first, *rest = await asyncio.gather(*calls, return_exceptions=True)
        await closing
        assert first.views == 1
        assert all(isinstance(one, asyncio.CancelledError) for one in rest)

    try:
        asyncio.run(asyncio.wait_for(work(), 20))
    finally:
        held.set()
        engine.close()
    assert decoded == [b"a"]
