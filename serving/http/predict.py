"""Handle the images of prediction requests: from encoded bytes to the objects of the JSON answers.

    bytes --check options, size--> engine.predict --> Prediction --> JSON object
                                   within the deadline

These functions are called by `App` for HTTP requests, and by `ImageClassifier` for BentoML's own
clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from serving.errors import DeadlineExceeded, FledgeError, TooLarge
from serving.http.forms import PredictOptions
from serving.http.model_manager import LoadedModel, ModelManager
from serving.http.problems import code_of, is_fault, problem
from serving.settings import Settings

_log = logging.getLogger("bentoml.fledge")


async def predict_image(
    model_manager: ModelManager, data: bytes, options: PredictOptions
) -> dict[str, Any]:
    """Classify one image and return the JSON object of the answer.

    Args:
        model_manager: Provides the model and the limits.
        data: The encoded image file.
        options: Options of the request.

    Raises:
        FledgeError: An option is wrong, the image can't be used, the queue is full, the deadline
            has passed, or no model is loaded.
    """
    settings = model_manager.settings
    end = asyncio.get_running_loop().time() + settings.deadline
    with model_manager.acquire() as model:
        async with _deadline(settings, end):
            return await _predict(model, settings, data, options)


async def predict_images(
    model_manager: ModelManager,
    images: Sequence[bytes],
    options: PredictOptions,
    request_id: str,
    explain: Callable[[FledgeError, bytes], FledgeError] = lambda error, _: error,
) -> list[dict[str, Any]]:
    """Classify several images; return an answer or {"error": problem document} for each, in order.

    A failed image does not affect the others. All images are predicted by the same version of the
    model.

    Args:
        model_manager: Provides the model and the limits.
        images: The encoded image files.
        options: Options of the request, for all images.
        request_id: Id of the request, for problem documents and the log.
        explain: Returns the error that is answered for an error and the image that caused it.

    Raises:
        FledgeError: An option is wrong, or no model is loaded. No image was processed.
    """
    settings, telemetry = model_manager.settings, model_manager.telemetry
    end = asyncio.get_running_loop().time() + settings.deadline

    with model_manager.acquire() as model:
        model.predictor.check(options.tta, options.top_k)
        # The images of one request may take only a part of the queue and of the threads, so that
        # the images of others don't wait for all of them.
        concurrency = asyncio.Semaphore(min(model.engine.share, max(1, settings.max_queue // 4)))

        async def predict_one(data: bytes) -> dict[str, Any]:
            try:
                async with _deadline(settings, end), concurrency:
                    answer = await _predict(model, settings, data, options)
            except Exception as error:
                if is_fault(error):
                    _log.exception("request %s failed", request_id)
                telemetry.count(code_of(error))
                told = explain(error, data) if isinstance(error, FledgeError) else error
                return {"error": problem(told, request_id)}
            telemetry.answered(answer)
            return answer

        return await asyncio.gather(*map(predict_one, images))


async def _predict(
    model: LoadedModel, settings: Settings, data: bytes, options: PredictOptions
) -> dict[str, Any]:
    model.predictor.check(options.tta, options.top_k)
    if len(data) > settings.max_bytes:
        raise TooLarge(
            f"an image of {len(data)} bytes; {settings.max_bytes} are allowed (FLEDGE_MAX_BYTES)"
        )
    prediction = await model.engine.predict(data, options.tta)
    return model.predictor.answer(prediction, options.top_k)


@asynccontextmanager
async def _deadline(settings: Settings, end: float) -> AsyncIterator[None]:
    """Cancel the `async with` block at `end`, the time of the event loop, with an error."""
    try:
        async with asyncio.timeout_at(end):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"no answer within {settings.deadline:g} s; try again later"
        ) from error
