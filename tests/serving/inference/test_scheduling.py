import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from serving.errors import BrokenImage, Overloaded, WorkError
from serving.imaging.cost import Cost
from serving.inference.admission import QueueLimit
from serving.inference.decoding import ImageDecoder, NeedsIsolation
from serving.inference.dynamic_batcher import DynamicBatcher
from serving.inference.predictor import Prediction, Prepared
from serving.inference.scheduling import PerImageEngine


class Stub:
    """Replaces a predictor: the prediction of an image is the number of its bytes."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.low_latency: list[bool] = []
        self.started = 0
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.seen: list[tuple[str, float]] = []
        self.isolated: list[Cost] = []

    def prepare(self, data: bytes, tta: int) -> Prepared:
        if data == b"broken":
            raise BrokenImage("broken")
        return Prepared(np.full((max(1, tta), 1, 1, 3), len(data), np.uint8), ())

    def prepare_isolated(
        self, data: bytes, tta: int, cost: Cost, cancelled: Callable[[], bool]
    ) -> Prepared:
        self.isolated.append(cost)
        while data == b"endless" and not cancelled():
            time.sleep(0.01)
        return self.prepare(data.removeprefix(b"large "), tta)

    def decoder(self) -> ImageDecoder:
        def prepare(data: bytes, tta: int) -> Prepared:
            if data.startswith((b"large ", b"endless")):
                raise NeedsIsolation(Cost(1, 1, 1, 1))
            return self.prepare(data, tta)

        return ImageDecoder(prepare, self.prepare_isolated, 1)

    def predict(self, prepared: list[Prepared], *, low_latency: bool) -> list[Prediction]:
        self.running.set()
        self.started += 1
        self.low_latency.append(low_latency)
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


def per_image(stub: Stub, limit: int = 64) -> PerImageEngine:
    return PerImageEngine(
        stub.decoder(), stub.predict, QueueLimit(limit, stub.observe), 2, stub.observe
    )


def dynamic(stub: Stub, limit: int = 64, cap: int = 4) -> DynamicBatcher:
    return DynamicBatcher(
        stub.decoder(), stub.predict, QueueLimit(limit, stub.observe), 2, stub.observe, cap
    )


Make = Callable[[Stub], PerImageEngine | DynamicBatcher]
both = pytest.mark.parametrize("make", [per_image, dynamic])


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
def test_each_image_gets_its_own_prediction(make: Make):
    async def work(stub: Stub, engine):
        names = [b"x" * n for n in range(1, 12)]
        answers = await asyncio.gather(*(engine.predict(name) for name in names))
        assert [int(answer.probabilities[0]) for answer in answers] == list(range(1, 12))

    run(make, work)


@both
def test_an_error_is_reported_to_its_own_image_only(make: Make):
    async def work(stub: Stub, engine):
        names = [b"x", b"broken", b"x" * 13, b"xx", b"xxx"]
        answers = await asyncio.gather(
            *(engine.predict(name) for name in names), return_exceptions=True
        )
        assert isinstance(answers[1], BrokenImage)
        assert isinstance(answers[2], WorkError)
        assert [int(answers[n].probabilities[0]) for n in (0, 3, 4)] == [1, 2, 3]

    run(make, work)


@pytest.mark.parametrize("make", [lambda stub: per_image(stub, 3), lambda stub: dynamic(stub, 3)])
def test_a_full_queue_refuses_at_once_and_admits_again_later(make: Make):
    async def work(stub: Stub, engine):
        stub.gate.clear()
        admitted = [asyncio.create_task(engine.predict(b"x")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await engine.predict(b"x")
        stub.gate.set()
        await asyncio.gather(*admitted)
        await engine.predict(b"x")

    run(make, work)


@both
def test_a_cancelled_image_is_removed_from_the_queue(make: Make):
    async def work(stub: Stub, engine):
        stub.gate.clear()
        busy = [asyncio.create_task(engine.predict(b"x")) for _ in range(2)]
        await until(stub.running.is_set)
        cancelled = asyncio.create_task(engine.predict(b"x" * 9))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        stub.gate.set()
        await asyncio.gather(*busy)
        await engine.predict(b"xx")

    stub = run(make, work)
    assert 9 not in [name for names in stub.runs for name in names]


def test_a_batch_has_the_images_that_came_while_the_graph_was_busy():
    async def work(stub: Stub, engine):
        stub.gate.clear()
        first = asyncio.create_task(engine.predict(b"x"))
        await until(stub.running.is_set)  # a single image does not wait for others
        rest = [asyncio.create_task(engine.predict(b"x" * n)) for n in range(2, 8)]
        await until(lambda: len(engine._ready) == 6)
        stub.gate.set()
        await asyncio.gather(first, *rest)

    stub = run(dynamic, work)
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

    # 3 rows and 2 do not fit into 4; 9 are more than the cap and form a batch of one image.
    assert run(dynamic, work).runs == [[1], [2], [3], [4], [5]]


def test_a_batch_that_fails_is_repeated_image_by_image():
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

    assert run(dynamic, work).runs == [[1], [2, 13, 3], [2], [13], [3]]


def test_a_failing_observer_does_not_end_the_thread():
    async def work(stub: Stub, engine):
        original = engine._observe
        engine._observe = lambda phase, value: 1 / (phase != "rows")
        with pytest.raises(ZeroDivisionError):
            await engine.predict(b"x")
        engine._observe = original
        assert int((await engine.predict(b"xx")).probabilities[0]) == 2

    run(dynamic, work)


@both
def test_every_phase_is_observed(make: Make):
    async def work(stub: Stub, engine):
        await engine.predict(b"x", 3)

    seen = dict(run(make, work).seen)
    assert seen.keys() == {"waiting", "queue", "decode", "infer", "rows"}
    assert seen["rows"] == 3


class NotAnException(BaseException):
    """Like the error of a faulty extension module."""


def test_no_error_ends_a_thread():
    async def work(stub: Stub, engine: PerImageEngine) -> None:
        real = stub.prepare
        for error in (NotAnException, MemoryError):
            stub.prepare = lambda data, tta, error=error: (_ for _ in ()).throw(error())
            for _ in range(4):  # more than there are threads
                with pytest.raises(error):
                    await engine.predict(b"x")
        stub.prepare = real
        assert int((await engine.predict(b"xx")).probabilities[0]) == 2

    run(per_image, work)


def test_a_thread_survives_an_event_loop_that_ended_before_the_prediction():
    stub = Stub()
    engine = per_image(stub)

    async def end_early() -> None:
        stub.gate.clear()
        pending = asyncio.create_task(engine.predict(b"x"))
        await until(stub.running.is_set)
        assert not pending.done()

    asyncio.run(end_early())
    stub.gate.set()

    async def work() -> None:
        assert int((await engine.predict(b"xx")).probabilities[0]) == 2

    asyncio.run(asyncio.wait_for(work(), 20))
    engine.close()


def test_close_waits_for_all_images_that_are_not_cancelled():
    stub = Stub()
    engine = per_image(stub)

    async def work() -> None:
        stub.gate.clear()
        calls = [asyncio.create_task(engine.predict(b"x" * n)) for n in range(1, 7)]
        await until(lambda: stub.started == 2)
        calls[4].cancel()
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.05)
        assert not closing.done()
        stub.gate.set()
        await asyncio.gather(closing, *calls, return_exceptions=True)

    asyncio.run(asyncio.wait_for(work(), 20))
    assert sorted(name for names in stub.runs for name in names) == [1, 2, 3, 4, 6]


def test_batches_run_concurrently():
    stub = Stub()
    stub.gate.clear()
    engine = DynamicBatcher(
        stub.decoder(), stub.predict, QueueLimit(64, stub.observe), 2, stub.observe, 2, 3
    )

    async def work() -> None:
        calls = [asyncio.create_task(engine.predict(b"x" * number)) for number in range(1, 10)]
        await until(lambda: stub.started == 3)
        stub.gate.set()
        await asyncio.gather(*calls)

    try:
        asyncio.run(asyncio.wait_for(work(), 20))
    finally:
        stub.gate.set()
        engine.close()
    assert sorted(name for names in stub.runs for name in names) == [*range(1, 10)]


@both
def test_low_latency_is_for_the_only_image_in_progress(make: Make):
    async def work(stub: Stub, engine: PerImageEngine | DynamicBatcher) -> None:
        await engine.predict(b"x")
        stub.gate.clear()
        calls = [asyncio.create_task(engine.predict(b"x")) for _ in range(6)]
        await until(lambda: stub.started > 1)
        stub.gate.set()
        await asyncio.gather(*calls)

    low_latency = run(make, work).low_latency
    assert low_latency[0] is True
    assert not all(low_latency)


@both
def test_expensive_images_are_isolated_and_others_do_not_wait_for_them(make: Make) -> None:
    async def work(stub: Stub, engine: PerImageEngine | DynamicBatcher) -> None:
        assert (await engine.predict(b"large four")).probabilities == [4.0]
        endless = [asyncio.ensure_future(engine.predict(b"endless")) for _ in range(3)]
        await until(lambda: len(stub.isolated) == 2)
        assert (await engine.predict(b"three")).probabilities == [5.0]
        for one in endless:
            one.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        assert (await engine.predict(b"large five")).probabilities == [4.0]

    stub = run(make, work)
    assert len(stub.isolated) in (3, 4)  # an image that is cancelled while queued is left out


def test_threads_of_cancelled_images_are_overdue_until_they_end():
    async def work(stub: Stub, engine: PerImageEngine) -> None:
        stub.gate.clear()
        running = [asyncio.ensure_future(engine.predict(b"x")) for _ in range(3)]
        await until(lambda: stub.started == 2)
        assert engine.overdue.count == 0
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert engine.overdue.count == 2  # the third was waiting
        assert engine.overdue.all
        stub.gate.set()
        await until(lambda: engine.overdue.count == 0)
        assert not engine.overdue.all
        assert (await engine.predict(b"xx")).probabilities == [2.0]

    assert ("overdue", 2) in run(per_image, work).seen


@both
def test_an_image_that_is_handed_over_after_its_request_has_ended_is_not_overdue(make: Make):
    async def work(stub: Stub, engine: PerImageEngine | DynamicBatcher) -> None:
        entered, leave = threading.Event(), threading.Event()

        def prepare(data: bytes, tta: int) -> Prepared:
            entered.set()
            assert leave.wait(10)
            raise NeedsIsolation(Cost(1, 1, 1, 1))

        engine._decoder = engine._decoder._replace(prepare=prepare)
        call = asyncio.ensure_future(engine.predict(b"x"))
        await until(entered.is_set)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert engine.overdue.count == 1
        leave.set()
        await until(lambda: engine.overdue.count == 0)

    run(make, work)
