"""Run the images of concurrent requests in threads, one by one or in dynamic batches.

There are two engines:

`PerImageEngine`: Each of several threads decodes and predicts one image at a time. Best where
    batching doesn't reduce the time per image, as on most CPUs.
`DynamicBatcher`: Some threads decode images, others run the graph. When a thread of the second kind
    is free, it runs the graph on all decoded images, up to the largest batch. An image never waits
    for more images to arrive: batches form only while the graph is running.

Both engines reject an image if too many images are queued or in progress, skip images whose request
was cancelled, and report an error only to the request of the image that caused the error.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from serving.errors import Overloaded
from serving.imaging.cost import Cost
from serving.inference.admission import (
    CLOSE_SECONDS,
    EXTRA_THREADS,
    Observe,
    OverdueCount,
    QueueLimit,
)
from serving.inference.decoding import (
    DecodingBudget,
    ImageDecoder,
    NeedsIsolation,
    Prepare,
    image_decoder,
    log_isolated,
    request_id,
)
from serving.inference.dynamic_batcher import DynamicBatcher
from serving.inference.predictor import Predict, Prediction, Predictor, Prepared
from serving.inference.runtime import on_cpu


class Engine(Protocol):
    """Interface of the classes that predict encoded images in background threads.

    Attributes:
        share: Number of images of one request that may be in progress together. It is just enough
            to keep all threads busy, so that other requests wait for few of them.
        overdue: Count of the threads that work on an image whose request has ended.
    """

    share: int
    overdue: OverdueCount

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        """Predict one image. An image whose call is cancelled while queued is not predicted.

        Args:
            data: The encoded image file.
            tta: Number of TTA views (crops or flips) to average; 0 and 1 both mean the plain view.

        Raises:
            Overloaded: Too many images are queued or in progress.
            FledgeError: `Predictor.prepare` or `Predictor.predict` failed on this image.
        """
        ...

    def close(self) -> None:
        """Stop the threads; call this method when no prediction is in progress."""
        ...


def build_engine(
    predictor: Predictor,
    *,
    cap: int,
    threads: int,
    max_queue: int,
    max_pixels: int,
    budget: DecodingBudget,
    observe: Observe,
) -> Engine:
    """Create a `PerImageEngine` if `cap` is 1, else a `DynamicBatcher`.

    Args:
        predictor: Predictor to run; called from several threads at the same time.
        cap: Largest batch, in rows (images times TTA views).
        threads: Number of CPU cores to use. `DynamicBatcher` starts as many threads that decode,
            and on a CPU also as many threads that run the graph.
            `PerImageEngine` starts `EXTRA_THREADS` more threads than cores.
        max_queue: Largest number of images that are queued or in progress. Any further image is
            rejected with `Overloaded`.
        max_pixels: Largest accepted width times height of an image.
        budget: Bytes that decoding may take, for all images in progress together.
        observe: Callback for measurements; called from several threads.
    """
    limit = QueueLimit(max_queue, observe)
    decoder = image_decoder(predictor, max_pixels, budget)
    predict = partial(predictor.predict, max_rows=cap)
    if cap == 1:
        return PerImageEngine(decoder, predict, limit, threads + EXTRA_THREADS, observe)
    runners = threads if on_cpu(predictor.runtime.provider) else 1
    return DynamicBatcher(decoder, predict, limit, threads, observe, cap, runners)


@dataclass(slots=True)
class _EncodedImage:
    data: bytes
    tta: int
    queued: float  # time.perf_counter()
    future: asyncio.Future[Prediction]
    request: str
    started: bool = False
    overdue: bool = False


class PerImageEngine:
    """Engine whose threads each decode and predict one image at a time.

    Images that must be decoded in a process of their own have threads of their own.
    """

    def __init__(
        self,
        decoder: ImageDecoder,
        predict: Predict,
        limit: QueueLimit,
        threads: int,
        observe: Observe,
    ) -> None:
        self._decoder, self._predict = decoder, predict
        self._limit, self._observe = limit, observe
        self.share = threads + 1
        self.overdue = OverdueCount(threads, observe)
        # A ThreadPoolExecutor, with its futures wrapped for asyncio, would double the overhead.
        self._queue: SimpleQueue[_EncodedImage | None] = SimpleQueue()
        self._isolated: SimpleQueue[tuple[_EncodedImage, Cost] | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._run, name=f"fledge-image-{number}", daemon=True)
            for number in range(threads)
        ]
        self._isolated_threads = [
            Thread(target=self._run_isolated, name=f"fledge-isolated-{number}", daemon=True)
            for number in range(decoder.threads)
        ]
        for thread in (*self._threads, *self._isolated_threads):
            thread.start()

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        with self._limit.admit():
            future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
            image = _EncodedImage(data, tta, time.perf_counter(), future, request_id.get())
            self._queue.put(image)
            try:
                return await future
            except asyncio.CancelledError:
                self.overdue.add(image)
                raise
            finally:
                image.data = b""  # a cancelled image may stay in the queue
                # Break the reference cycle: future -> error -> traceback -> this frame -> future.
                del future, image

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for _ in self._isolated_threads:
            self._isolated.put(None)
        end = time.monotonic() + CLOSE_SECONDS
        for thread in (*self._threads, *self._isolated_threads):
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while image := self._queue.get():
            self._process(image, self._decoder.prepare)
            del image  # free its bytes now, not when the next image comes

    def _run_isolated(self) -> None:
        while item := self._isolated.get():
            image, cost = item

            def prepare(
                data: bytes, tta: int, cost: Cost = cost, image: _EncodedImage = image
            ) -> Prepared:
                return self._decoder.prepare_isolated(data, tta, cost, image.future.cancelled)

            self._process(image, prepare)
            del image, item, prepare

    def _process(self, image: _EncodedImage, prepare: Prepare) -> None:
        if image.future.cancelled():
            # It may have been counted before it was handed over.
            with suppress(RuntimeError):
                image.future.get_loop().call_soon_threadsafe(self.overdue.remove, image)
            return
        image.started = True
        result: Prediction | BaseException
        try:
            result = self._decode_and_predict(prepare, image.data, image.tta, image.queued)
        except NeedsIsolation as need:
            image.started = False
            # Expensive images leave places in the queue to others.
            if self._isolated.qsize() < max(1, self._limit.limit // 2):
                log_isolated(len(image.data), need.cost, image.request)
                self._isolated.put((image, need.cost))
                return
            result = Overloaded("many expensive images are waiting already; try again later")
        except BaseException as error:  # any: the caller gets it, and the thread continues
            result = error
        with suppress(RuntimeError):  # the event loop is closed
            image.future.get_loop().call_soon_threadsafe(self._finish, image, result)
        del image, result  # break the reference cycle through the error's traceback

    def _finish(self, image: _EncodedImage, result: Prediction | BaseException) -> None:
        image.started = False
        self.overdue.remove(image)
        _set_result(image.future, result)

    # The future is not an argument, because an error's traceback keeps this frame alive.
    def _decode_and_predict(
        self, prepare: Prepare, data: bytes, tta: int, queued: float
    ) -> Prediction:
        start = time.perf_counter()
        prepared = prepare(data, tta)
        decoded = time.perf_counter()
        prediction = self._predict([prepared], low_latency=self._limit.count == 1)[0]
        done = time.perf_counter()
        observe = self._observe
        observe("queue", start - queued)
        observe("decode", decoded - start)
        observe("infer", done - decoded)
        observe("rows", len(prepared.pixels))
        return prediction


def _set_result(future: asyncio.Future[Prediction], result: Prediction | BaseException) -> None:
    if future.done():  # cancelled meanwhile
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
