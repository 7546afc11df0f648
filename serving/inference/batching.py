"""From the door to the graph: a bounded room, and two ways to work through it.

`PerImageEngine`     one thread takes one image from bytes to prediction; several side by side. Best where
            a batch costs as much an image as a lone one, which is so on most CPUs.
`DynamicBatcher`   threads decode; another, on a CPU one a core, takes all that is ready, up to the cap,
            the moment it is free. A lone image never waits; batches form while the device is busy.

Both refuse at once when full, drop what nobody waits for any more, and let no image touch another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Final, NamedTuple, Protocol

from serving.errors import Overloaded
from serving.inference.predictor import Prediction, Predictor, Prepared
from serving.inference.runtime import on_cpu

Observe = Callable[[str, float], None]
"""Told (phase, seconds): "queue", "decode", "infer"; ("rows", count) for every run of the graph,
and ("waiting", count) of the images inside."""


SPARE: Final = 1
"""Lanes above one a core: one that waits for Python's lock or its next image leaves a core idle. On
2 cores a third lane is worth some 5 %, and a fourth no more than that."""


class Engine(Protocol):
    """What the service needs: bytes in, prediction out."""

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        """Errors as `Predictor.prepare` and `Predictor.predict`, and `Overloaded`."""
        ...

    def close(self) -> None:
        """Stop the threads; call it when no prediction is awaited any more."""
        ...


def build(
    predictor: Predictor,
    *,
    cap: int,
    threads: int,
    max_queue: int,
    max_pixels: int,
    observe: Observe,
) -> Engine:
    """The engine that fits: `PerImageEngine` where batches are not worth having, else `DynamicBatcher`.

    Args:
        predictor: May be called from several threads at once.
        cap: Most rows (images times views) of one run of the graph.
        threads: Cores to keep busy: with decoding and, where the graph runs on them, with runs of
            the graph side by side, each of which is given one core.
        max_queue: Images held unanswered; one more is `Overloaded`.
        max_pixels: Of an image, width times height.
        observe: Where timings go; called from several threads.
    """
    room = QueueLimit(max_queue, observe)

    def prepare(data: bytes, tta: int) -> Prepared:
        return predictor.prepare(data, tta, max_pixels=max_pixels)

    if cap == 1:
        return PerImageEngine(prepare, predictor.predict, room, threads + SPARE, observe)
    runners = threads if on_cpu(predictor.runtime.provider) else 1
    return DynamicBatcher(prepare, predictor.predict, room, threads, observe, cap, runners)


class QueueLimit:
    """Counts the images inside. Used by the event loop alone, so it needs no lock."""

    def __init__(self, limit: int, observe: Observe) -> None:
        """`limit`: images that may be inside at once."""
        self.limit = limit
        self.inside = 0
        self._observe = observe

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one place.

        Raises:
            Overloaded: There is none.
        """
        if self.inside >= self.limit:
            raise Overloaded(f"{self.limit} images are waiting already; ask again in a second")
        self.inside += 1
        self._observe("waiting", self.inside)
        try:
            yield
        finally:
            self.inside -= 1
            self._observe("waiting", self.inside)


Prepare = Callable[[bytes, int], Prepared]


class Predict(Protocol):
    """`Predictor.predict`."""

    def __call__(self, prepared: list[Prepared], *, alone: bool) -> list[Prediction]:
        """One run of the graph."""
        ...


class _Job(NamedTuple):
    data: bytes
    tta: int
    queued: float
    future: asyncio.Future[Prediction]


class PerImageEngine:
    """Side by side, each thread with one image at a time, from its bytes to its prediction."""

    def __init__(
        self, prepare: Prepare, predict: Predict, room: QueueLimit, threads: int, observe: Observe
    ) -> None:
        """See `build`."""
        self._prepare, self._predict = prepare, predict
        self._room, self._observe = room, observe
        # An executor's futures, and theirs in asyncio, cost as much as all else around the answer.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._run, name=f"fledge-lane-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        """See `Engine`. Cancelling it takes the image out of the queue."""
        with self._room.place():
            future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
            self._jobs.put(_Job(data, tta, time.perf_counter(), future))
            try:
                return await future
            finally:
                del future  # it knows the error, whose traceback knows this frame

    def close(self) -> None:
        """See `Engine`."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while job := self._jobs.get():
            self._answer(job)
            del job  # or its image would stay until the next one comes

    def _answer(self, job: _Job) -> None:
        if job.future.cancelled():
            return
        told: Prediction | BaseException
        try:
            told = self._work(job.data, job.tta, job.queued)
        except BaseException as error:  # whatever it is, it belongs to the one who asked
            told = error
        with suppress(RuntimeError):  # a loop that has ended: nobody waits
            job.future.get_loop().call_soon_threadsafe(_tell, job.future, told)
        del job, told  # an error's traceback knows this frame

    def _work(self, data: bytes, tta: int, queued: float) -> Prediction:
        begun = time.perf_counter()
        prepared = self._prepare(data, tta)
        decoded = time.perf_counter()
        prediction = self._predict([prepared], alone=self._room.inside == 1)[0]
        done = time.perf_counter()
        observe = self._observe
        observe("queue", begun - queued)
        observe("decode", decoded - begun)
        observe("infer", done - decoded)
        observe("rows", len(prepared.pixels))
        return prediction


def _tell(future: asyncio.Future[Prediction], told: Prediction | BaseException) -> None:
    if future.done():  # cancelled meanwhile
        return
    if isinstance(told, BaseException):
        future.set_exception(told)
    else:
        future.set_result(told)


class _Item(NamedTuple):
    prepared: Prepared
    future: Future[Prediction]
    queued: float


class DynamicBatcher:
    """Decodes on many threads; each that runs the graph takes whatever is ready when it is free."""

    def __init__(
        self,
        prepare: Prepare,
        predict: Predict,
        room: QueueLimit,
        threads: int,
        observe: Observe,
        cap: int,
        runners: int = 1,
    ) -> None:
        """See `build`; `runners`: batches that run side by side."""
        self._prepare, self._predict = prepare, predict
        self._room, self._observe, self._cap = room, observe, cap
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="fledge-decode")
        self._ready: deque[_Item] = deque()
        self._changed = Condition()
        self._open = True
        self._runners = [
            Thread(target=self._run, name=f"fledge-infer-{number}", daemon=True)
            for number in range(runners)
        ]
        for runner in self._runners:
            runner.start()

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        """See `Engine`. Cancelling it takes the image out of the queue."""
        with self._room.place():
            loop = asyncio.get_running_loop()
            future = await loop.run_in_executor(self._decoders, self._decode, data, tta)
            waiting: Awaitable[Prediction] = asyncio.wrap_future(future)
            return await waiting

    def close(self) -> None:
        """See `Engine`."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for runner in self._runners:
            runner.join()

    def _decode(self, data: bytes, tta: int) -> Future[Prediction]:
        begun = time.perf_counter()
        prepared = self._prepare(data, tta)
        now = time.perf_counter()
        self._observe("decode", now - begun)
        item = _Item(prepared, Future(), now)
        with self._changed:
            self._ready.append(item)
            self._changed.notify()
        return item.future

    def _run(self) -> None:
        while batch := self._take():
            # A future that can't be set running was cancelled: its caller has gone.
            wanted = [item for item in batch if item.future.set_running_or_notify_cancel()]
            if wanted:
                self._answer(wanted)

    def _take(self) -> list[_Item]:
        """All that is ready, in order, up to the cap; at least one; none when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._open)
            batch: list[_Item] = []
            rows = 0
            while self._ready:
                rows += len(self._ready[0].prepared.pixels)
                if batch and rows > self._cap:
                    break
                batch.append(self._ready.popleft())
            return batch

    def _answer(self, batch: list[_Item]) -> None:
        # Nothing may get out of here: it would end a thread that answers.
        try:
            begun = time.perf_counter()
            alone = self._room.inside == 1
            predictions = self._predict([item.prepared for item in batch], alone=alone)
            seconds = time.perf_counter() - begun
            self._observe("rows", sum(len(item.prepared.pixels) for item in batch))
            for item, prediction in zip(batch, predictions, strict=True):
                self._observe("queue", begun - item.queued)
                self._observe("infer", seconds)
                item.future.set_result(prediction)
        except Exception as error:  # whatever it is, it belongs to the one who asked
            for item in batch:
                if item.future.done():
                    continue
                if len(batch) == 1:
                    item.future.set_exception(error)
                else:
                    self._answer([item])
