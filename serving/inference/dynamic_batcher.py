"""An engine that runs the graph on all images that are decoded, up to the largest batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Event, Thread
from typing import NamedTuple

from serving.errors import Overloaded
from serving.inference.admission import CLOSE_SECONDS, Observe, OverdueCount, QueueLimit
from serving.inference.decoding import (
    ImageDecoder,
    NeedsIsolation,
    Prepare,
    log_isolated,
    request_id,
)
from serving.inference.predictor import Predict, Prediction, Prepared


@dataclass(slots=True)
class _HeldImage:
    data: bytes
    loop: asyncio.AbstractEventLoop
    started: bool = False
    overdue: bool = False


class _DecodedImage(NamedTuple):
    prepared: Prepared
    future: Future[Prediction]
    queued: float  # time.perf_counter()


class DynamicBatcher:
    """Engine with threads that decode, and threads that run the graph on all decoded images."""

    def __init__(
        self,
        decoder: ImageDecoder,
        predict: Predict,
        limit: QueueLimit,
        threads: int,
        observe: Observe,
        cap: int,
        runners: int = 1,
    ) -> None:
        """Start the threads.

        Args:
            decoder: Functions that decode one image.
            predict: Function that runs the graph on a batch.
            limit: Counter of the images that are queued or in progress.
            threads: Number of threads that decode.
            observe: Callback for measurements.
            cap: Largest batch, in rows (images times TTA views).
            runners: Number of threads that run the graph.
        """
        self._decoder, self._predict = decoder, predict
        self._limit, self._observe, self._cap = limit, observe, cap
        self.share = max(2 * cap, threads + 1)
        self.overdue = OverdueCount(threads, observe)
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="fledge-decode")
        self._isolated = ThreadPoolExecutor(decoder.threads, thread_name_prefix="fledge-isolated")
        self._ready: deque[_DecodedImage] = deque()
        self._changed = Condition()
        self._open = True
        self._expensive = 0  # images that wait for `_isolated` or are decoded there
        self._runners = [
            Thread(target=self._run, name=f"fledge-infer-{number}", daemon=True)
            for number in range(runners)
        ]
        for runner in self._runners:
            runner.start()

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        with self._limit.admit():
            loop = asyncio.get_running_loop()
            held, cancelled = _HeldImage(data, loop), Event()
            prepare, executor = self._decoder.prepare, self._decoders
            try:
                try:
                    future = await loop.run_in_executor(executor, self._decode, held, tta, prepare)
                except NeedsIsolation as need:
                    cost = need.cost
                    # Expensive images leave places in the queue to others.
                    if self._expensive >= max(1, self._limit.limit // 2):
                        raise Overloaded(
                            "many expensive images are waiting already; try again later"
                        ) from None
                    log_isolated(len(data), cost, request_id.get())

                    def prepare_isolated(data: bytes, tta: int) -> Prepared:
                        return self._decoder.prepare_isolated(data, tta, cost, cancelled.is_set)

                    self._expensive += 1
                    try:
                        future = await loop.run_in_executor(
                            self._isolated, self._decode, held, tta, prepare_isolated
                        )
                    finally:
                        self._expensive -= 1
            except asyncio.CancelledError:
                self.overdue.add(held)
                raise
            finally:
                cancelled.set()
                held.data = b""  # a cancelled image may stay in the executor's queue
            prediction: Awaitable[Prediction] = asyncio.wrap_future(future)
            return await prediction

    def close(self) -> None:
        end = time.monotonic() + CLOSE_SECONDS
        # An executor can't be waited for with a limit of time.
        waiting = [
            Thread(target=executor.shutdown, kwargs={"cancel_futures": True}, daemon=True)
            for executor in (self._decoders, self._isolated)
        ]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join(max(0.0, end - time.monotonic()))
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for runner in self._runners:
            runner.join(max(0.0, end - time.monotonic()))

    def _decode(self, held: _HeldImage, tta: int, prepare: Prepare) -> Future[Prediction]:
        start = time.perf_counter()
        held.started = True
        try:
            prepared = prepare(held.data, tta)
        finally:
            held.started = False
            if held.overdue:
                with suppress(RuntimeError):  # the event loop is closed
                    held.loop.call_soon_threadsafe(self.overdue.remove, held)
        now = time.perf_counter()
        self._observe("decode", now - start)
        image = _DecodedImage(prepared, Future(), now)
        with self._changed:
            if held.data:  # else its caller has gone
                self._ready.append(image)
                self._changed.notify()
        return image.future

    def _run(self) -> None:
        while batch := self._next_batch():
            # `set_running_or_notify_cancel` returns False for a cancelled future.
            batch = [image for image in batch if image.future.set_running_or_notify_cancel()]
            if batch:
                self._process(batch)

    def _next_batch(self) -> list[_DecodedImage]:
        """Wait for a decoded image; return all decoded images up to `cap` rows, in order.

        An image with more than `cap` rows is returned alone. The list is empty if the batcher was
        closed and no image is left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._open)
            batch: list[_DecodedImage] = []
            rows = 0
            while self._ready:
                rows += len(self._ready[0].prepared.pixels)
                if batch and rows > self._cap:
                    break
                batch.append(self._ready.popleft())
            return batch

    def _process(self, batch: list[_DecodedImage]) -> None:
        # An exception that escapes would end the thread.
        try:
            start = time.perf_counter()
            low_latency = self._limit.count == 1
            prepared = [image.prepared for image in batch]
            predictions = self._predict(prepared, low_latency=low_latency)
            seconds = time.perf_counter() - start
            self._observe("rows", sum(len(image.prepared.pixels) for image in batch))
            for image, prediction in zip(batch, predictions, strict=True):
                self._observe("queue", start - image.queued)
                self._observe("infer", seconds)
                image.future.set_result(prediction)
        except Exception as error:
            for image in batch:
                if image.future.done():
                    continue
                if len(batch) == 1:
                    image.future.set_exception(error)
                else:  # run the images one by one, to find which caused the error
                    self._process([image])
