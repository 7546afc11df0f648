import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest

from serving.errors import BrokenImage, Overloaded, WorkError
from serving.inference.batching import DynamicBatcher, PerImageEngine, QueueLimit
from serving.inference.predictor import Prediction, Prepared


class Stub:
    """Stands for a predictor: an image's bytes are its name, its prediction is their length."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.alone: list[bool] = []
        self.begun = 0
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.seen: list[tuple[str, float]] = []

    def prepare(self, data: bytes, tta: int) -> Prepared:
        if data == b"broken":
            raise BrokenImage("broken")
        return Prepared(np.full((max(1, tta), 1, 1, 3), len(data), np.uint8), ())

    def predict(self, prepared: list[Prepared], *, alone: bool) -> list[Prediction]:
        self.running.set()
        self.begun += 1
        self.alone.append(alone)
        assert self.gate.wait(10)
        names = [int(item.pixels[0, 0, 0, 0]) for item in prepared]
        self.runs.append(names)
        if 13 in names:
            raise WorkError("13 brings the graph down")
        return [
            Prediction(np.array([float(name)]), np.zeros(2, np.float32), 0.0, len(item.pixels), ())
            for name, item in zip(names, prepared, strict=True)
        ]

    def observe(self, phase: str, value: float) -> None:
        self.seen.append((phase, value))


def lanes(stub: Stub, limit: int = 64) -> PerImageEngine:
    return PerImageEngine(
        stub.prepare, stub.predict, QueueLimit(limit, stub.observe), 2, stub.observe
    )


def batcher(stub: Stub, limit: int = 64, cap: int = 4) -> DynamicBatcher:
    return DynamicBatcher(
        stub.prepare, stub.predict, QueueLimit(limit, stub.observe), 2, stub.observe, cap
    )


Make = Callable[[Stub], PerImageEngine | DynamicBatcher]
both = pytest.mark.parametrize("make", [lanes, batcher])


def run(make: Make, work) -> Stub:
    stub = Stub()
    engine = make(stub)
    try:
        asyncio.run(asyncio.wait_for(work(stub, engine), 20))
    finally:
        stub.gate.set()
        engine.close()
    return stub


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


@both
def test_each_gets_its_own(make: Make):
    async def work(stub: Stub, engine):
        names = [b"x" * n for n in range(1, 12)]
        answers = await asyncio.gather(*(engine.predict(name) for name in names))
        assert [int(answer.probabilities[0]) for answer in answers] == list(range(1, 12))

    run(make, work)


@both
def test_a_hurt_image_hurts_nobody_else(make: Make):
    async def work(stub: Stub, engine):
        names = [b"x", b"broken", b"x" * 13, b"xx", b"xxx"]
        answers = await asyncio.gather(
            *(engine.predict(name) for name in names), return_exceptions=True
        )
        assert isinstance(answers[1], BrokenImage)
        assert isinstance(answers[2], WorkError)
        assert [int(answers[n].probabilities[0]) for n in (0, 3, 4)] == [1, 2, 3]

    run(make, work)


@pytest.mark.parametrize("make", [lambda stub: lanes(stub, 3), lambda stub: batcher(stub, 3)])
def test_a_full_house_refuses_at_once_and_opens_again(make: Make):
    async def work(stub: Stub, engine):
        stub.gate.clear()
        inside = [asyncio.create_task(engine.predict(b"x")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await engine.predict(b"x")
        stub.gate.set()
        await asyncio.gather(*inside)
        await engine.predict(b"x")

    run(make, work)


@both
def test_who_has_gone_is_dropped_from_the_queue(make: Make):
    async def work(stub: Stub, engine):
        stub.gate.clear()
        busy = [asyncio.create_task(engine.predict(b"x")) for _ in range(2)]
        await until(stub.running.is_set)
        gone = asyncio.create_task(engine.predict(b"x" * 9))
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        stub.gate.set()
        await asyncio.gather(*busy)
        await engine.predict(b"xx")

    stub = run(make, work)
    assert 9 not in [name for names in stub.runs for name in names]


def test_a_batch_is_what_gathered_while_the_graph_was_busy():
    async def work(stub: Stub, engine):
        stub.gate.clear()
        first = asyncio.create_task(engine.predict(b"x"))
        await until(stub.running.is_set)  # a lone image started without waiting for company
        rest = [asyncio.create_task(engine.predict(b"x" * n)) for n in range(2, 8)]
        await until(lambda: len(engine._ready) == 6)
        stub.gate.set()
        await asyncio.gather(first, *rest)

    stub = run(batcher, work)
    assert [len(names) for names in stub.runs] == [1, 4, 2]
    assert sorted(name for names in stub.runs for name in names) == list(range(1, 8))


def test_views_count_as_rows():
    async def work(stub: Stub, engine):
        stub.gate.clear()
        first = asyncio.create_task(engine.predict(b"x"))
        await until(stub.running.is_set)
        rest = []
        for n, tta in ((2, 3), (3, 2), (4, 9), (5, 1)):
            rest.append(asyncio.create_task(engine.predict(b"x" * n, tta)))
            await until(lambda: len(engine._ready) == len(rest))
        stub.gate.set()
        answers = await asyncio.gather(first, *rest)
        assert [answer.views for answer in answers] == [1, 3, 2, 9, 1]

    # 3 rows and 2 do not fit into 4; 9 are more than the cap and go alone.
    assert run(batcher, work).runs == [[1], [2], [3], [4], [5]]


def test_a_batch_that_fails_is_done_again_one_by_one():
    async def work(stub: Stub, engine):
        stub.gate.clear()
        first = asyncio.create_task(engine.predict(b"x"))
        await until(stub.running.is_set)
        rest = []
        for n in (2, 13, 3):
            rest.append(asyncio.create_task(engine.predict(b"x" * n)))
            await until(lambda: len(engine._ready) == len(rest))
        stub.gate.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        assert isinstance(answers[2], WorkError)
        assert [int(answers[n].probabilities[0]) for n in (0, 1, 3)] == [1, 2, 3]

    assert run(batcher, work).runs == [[1], [2, 13, 3], [2], [13], [3]]


def test_a_failing_observer_does_not_end_the_thread_that_answers():
    async def work(stub: Stub, engine):
        engine._observe, kept = lambda phase, value: 1 / (phase != "rows"), engine._observe
        with pytest.raises(ZeroDivisionError):
            await engine.predict(b"x")
        engine._observe = kept
        assert int((await engine.predict(b"xx")).probabilities[0]) == 2

    run(batcher, work)


@both
def test_every_phase_is_observed(make: Make):
    async def work(stub: Stub, engine):
        await engine.predict(b"x", 3)

    seen = dict(run(make, work).seen)
    assert seen.keys() == {"waiting", "queue", "decode", "infer", "rows"}
    assert seen["rows"] == 3


class Odd(BaseException):
    """No Exception, as a fault in an extension may be."""


def test_nothing_ends_a_lane():
    async def work(stub: Stub, engine: PerImageEngine) -> None:
        real = stub.prepare
        for error in (Odd, MemoryError):
            engine._prepare = lambda data, tta, error=error: (_ for _ in ()).throw(error())
            for _ in range(4):  # more than there are lanes
                with pytest.raises(error):
                    await engine.predict(b"x")
        engine._prepare = real
        assert int((await engine.predict(b"xx")).probabilities[0]) == 2

    run(lanes, work)


def test_a_lane_outlives_a_loop_that_ended_before_its_answer():
    stub = Stub()
    engine = lanes(stub)

    async def leave() -> None:
        stub.gate.clear()
        left = asyncio.create_task(engine.predict(b"x"))
        await until(stub.running.is_set)
        assert not left.done()

    asyncio.run(leave())
    stub.gate.set()

    async def work() -> None:
        assert int((await engine.predict(b"xx")).probabilities[0]) == 2

    asyncio.run(asyncio.wait_for(work(), 20))
    engine.close()


def test_lanes_close_when_all_that_waits_is_done_or_has_no_taker():
    stub = Stub()
    engine = lanes(stub)

    async def work() -> None:
        stub.gate.clear()
        calls = [asyncio.create_task(engine.predict(b"x" * n)) for n in range(1, 7)]
        await until(lambda: stub.begun == 2)
        calls[4].cancel()
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.05)
        assert not closing.done()
        stub.gate.set()
        await asyncio.gather(closing, *calls, return_exceptions=True)

    asyncio.run(asyncio.wait_for(work(), 20))
    assert sorted(name for names in stub.runs for name in names) == [1, 2, 3, 4, 6]


def test_batches_run_side_by_side_one_a_core():
    stub = Stub()
    stub.gate.clear()
    engine = DynamicBatcher(
        stub.prepare, stub.predict, QueueLimit(64, stub.observe), 2, stub.observe, 2, 3
    )

    async def work() -> None:
        calls = [asyncio.create_task(engine.predict(b"x" * number)) for number in range(1, 10)]
        await until(lambda: stub.begun == 3)
        stub.gate.set()
        await asyncio.gather(*calls)

    try:
        asyncio.run(asyncio.wait_for(work(), 20))
    finally:
        stub.gate.set()
        engine.close()
    assert sorted(name for names in stub.runs for name in names) == [*range(1, 10)]


@both
def test_only_an_image_beside_which_there_is_none_has_all_cores(make: Make):
    async def work(stub: Stub, engine: PerImageEngine | DynamicBatcher) -> None:
        await engine.predict(b"x")
        stub.gate.clear()
        calls = [asyncio.create_task(engine.predict(b"x")) for _ in range(6)]
        await until(lambda: stub.begun > 1)
        stub.gate.set()
        await asyncio.gather(*calls)

    alone = run(make, work).alone
    assert alone[0] is True
    assert not all(alone)
