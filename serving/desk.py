"""The one core behind every door: loads the bundle, answers images, says whether it is ready."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from serving.batcher import Engine, build
from serving.errors import DeadlineExceeded, FledgeError, NotReady, TooLarge
from serving.forms import Options
from serving.predictor import Predictor, open_predictor
from serving.problems import code_of, is_fault, problem
from serving.settings import Settings
from serving.telemetry import Telemetry

GPU_CAP: Final = 16
"""Rows of one run on a GPU where the bundle states no tuning."""

_log = logging.getLogger("bentoml.fledge")


@dataclass(frozen=True)
class Model:
    """What is served: a predictor and the engine that feeds it."""

    predictor: Predictor
    engine: Engine
    manifest: bytes


class Desk:
    """Loads in the background and answers as soon as the golden images came out right."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        """Nothing is loaded before `start`."""
        self.settings = settings
        self.telemetry = telemetry
        self.refusal = "the bundle is still being loaded"
        self._model: Model | None = None

    def start(self) -> None:
        """Load and check the bundle on a thread, so that `/livez` answers meanwhile."""
        threading.Thread(target=self.load, name="fledge-load", daemon=True).start()

    def close(self) -> None:
        """Stop the engine."""
        model, self._model, self.refusal = self._model, None, "the service is stopping"
        if model:
            model.engine.close()

    @property
    def model(self) -> Model:
        """What is served now.

        Raises:
            NotReady: Nothing yet; `refusal` has the reason, which is for operators.
        """
        if self._model is None:
            raise NotReady("no model is being served now; GET /readyz says why")
        return self._model

    async def answer(self, data: bytes, options: Options) -> dict[str, Any]:
        """The answer to one image, as `Predictor.answer`.

        Raises:
            FledgeError: Any error of the path: option, image, overload, deadline, not ready.
        """
        model = self.model
        model.predictor.check(options.tta, options.top_k)
        if len(data) > self.settings.max_bytes:
            raise TooLarge(f"an image of {len(data)} bytes; {self.settings.max_bytes} are allowed")
        deadline = self.settings.deadline
        try:
            async with asyncio.timeout(deadline):
                prediction = await model.engine.predict(data, options.tta)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {deadline:g} s; ask again later") from error
        return model.predictor.answer(prediction, options.top_k)

    async def answer_each(
        self, images: Sequence[bytes], options: Options, request_id: str
    ) -> list[dict[str, Any]]:
        """One answer or {"error": problem} for each image, in order; none touches another.

        Raises:
            FledgeError: The options are wrong or nothing is served: then no image was looked at.
        """
        self.model.predictor.check(options.tta, options.top_k)
        # A long list takes its turn among the others instead of filling the house.
        turn = asyncio.Semaphore(max(1, self.settings.max_queue // 4))

        async def one(data: bytes) -> dict[str, Any]:
            try:
                async with turn:
                    answer = await self.answer(data, options)
            except Exception as error:
                if is_fault(error):
                    _log.exception("request %s failed", request_id)
                self.telemetry.count(code_of(error))
                return {"error": problem(error, request_id)}
            self.telemetry.count("ok")
            return answer

        return await asyncio.gather(*(one(data) for data in images))

    def load(self) -> None:
        """Load and check the bundle now; what goes wrong becomes `refusal`."""
        settings = self.settings
        try:
            predictor = _open(settings)
            cap = settings.max_batch or tuned_cap(predictor)
            engine = build(
                predictor,
                cap=cap,
                threads=settings.threads,
                max_queue=settings.max_queue,
                max_pixels=settings.max_pixels,
                observe=self.telemetry.observe,
            )
        except FledgeError as error:
            self.refusal = str(error)
            _log.error("not serving: %s", error)
            return
        except Exception:
            self.refusal = "loading failed; the log says why"
            _log.exception("not serving")
            return
        provider = predictor.runtime.provider
        self._model = Model(predictor, engine, _describe(predictor))
        self.telemetry.serving(predictor.model, predictor.precision, provider)
        # What was loaded stays: the collector need not walk it again at every turn.
        gc.collect()
        gc.freeze()
        _log.info(
            "serving %s in %s on %s, %d threads, up to %d rows a run",
            predictor.model,
            predictor.precision,
            provider,
            settings.threads,
            cap,
        )


def tuned_cap(predictor: Predictor) -> int:
    """Rows of one run: the bundle's tuning for this device, else 1 on a CPU and 16 on a GPU."""
    on_cpu = predictor.runtime.provider == "CPUExecutionProvider"
    tuning = predictor.manifest.tuning.get("cpu" if on_cpu else "cuda", {})
    return max(1, int(tuning.get("max_batch", 1 if on_cpu else GPU_CAP)))


def _open(settings: Settings) -> Predictor:
    # One core a run: the lanes side by side are what fills the cores.
    return open_predictor(
        settings.bundle, device=settings.device, precision=settings.precision, threads=1
    )


def _describe(predictor: Predictor) -> bytes:
    """The body of `GET /model`: the manifest, and how it is served here."""
    values = json.loads(predictor.manifest.to_json())
    provider = predictor.runtime.provider
    values["serving"] = {"precision": predictor.precision, "provider": provider}
    return json.dumps(values, ensure_ascii=False).encode()
