"""Prediction requests: from the bytes of images to JSON answers.

    bytes --check options, size--> engine.predict --> Prediction --> JSON
                                   within the deadline

`App` calls these functions for HTTP, `ImageClassifier` for BentoML's own clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from serving.errors import DeadlineExceeded, TooLarge
from serving.http.forms import PredictOptions
from serving.http.model_manager import LoadedModel, ModelManager
from serving.http.problems import code_of, is_fault, problem
from serving.settings import Settings

_log = logging.getLogger("bentoml.fledge")


async def predict_image(
    model_manager: ModelManager, data: bytes, options: PredictOptions
) -> dict[str, Any]:
    """The answer to one image, in the format of `Predictor.answer`.

    Raises:
        FledgeError: Wrong options, a bad image, overload, a missed deadline, or no model.
    """
    with model_manager.acquire() as model:
        return await _predict(model, model_manager.settings, data, options)


async def predict_images(
    model_manager: ModelManager,
    images: Sequence[bytes],
    options: PredictOptions,
    request_id: str,
) -> list[dict[str, Any]]:
    """An answer, or {"error": problem}, for each image, in order.

    An image that fails does not affect the others. All images are predicted by the same version of
    the model.

    Raises:
        FledgeError: The options are wrong, or no model is loaded. No image was processed.
    """
    settings, telemetry = model_manager.settings, model_manager.telemetry
    # The images of one request may fill only a part of the queue, so that others are accepted.
    concurrency = asyncio.Semaphore(max(1, settings.max_queue // 4))

    with model_manager.acquire() as model:
        model.predictor.check(options.tta, options.top_k)

        async def predict_one(data: bytes) -> dict[str, Any]:
            try:
                async with concurrency:
                    answer = await _predict(model, settings, data, options)
            except Exception as error:
                if is_fault(error):
                    _log.exception("request %s failed", request_id)
                telemetry.count(code_of(error))
                return {"error": problem(error, request_id)}
            telemetry.answered(answer)
            return answer

        return await asyncio.gather(*map(predict_one, images))


async def _predict(
    model: LoadedModel, settings: Settings, data: bytes, options: PredictOptions
) -> dict[str, Any]:
    model.predictor.check(options.tta, options.top_k)
    if len(data) > settings.max_bytes:
        raise TooLarge(f"an image of {len(data)} bytes; {settings.max_bytes} are allowed")
    try:
        async with asyncio.timeout(settings.deadline):
            prediction = await model.engine.predict(data, options.tta)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"no answer within {settings.deadline:g} s; try again later"
        ) from error
    return model.predictor.answer(prediction, options.top_k)
