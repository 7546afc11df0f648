"""The one core behind every door: loads the bundle, answers images, says whether it is ready."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from serving import __version__
from serving.bundle import storage
from serving.errors import DeadlineExceeded, FledgeError, NotReady, TooLarge
from serving.http.forms import PredictOptions
from serving.http.problems import code_of, is_fault, problem
from serving.http.telemetry import Telemetry
from serving.inference.batching import Engine, build
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from serving.settings import Settings
from serving.utils import malloc

WATCH: Final = 1.0
"""Seconds between two looks at the manifest."""
RETRY: Final = 10.0
LONGEST: Final = 300.0
"""Seconds until a bundle that was refused is tried again: at first, and at most."""
_PAUSE: Final = 0.02

_log = logging.getLogger("bentoml.fledge")


@dataclass
class LoadedModel:
    """What is served: a predictor and the engine that feeds it.

    users: requests that hold it; counted by the event loop alone.
    """

    predictor: Predictor
    engine: Engine
    manifest: bytes
    users: int = 0

    def close(self) -> None:
        """Wait until nobody holds it, then stop the engine."""
        while self.users:
            time.sleep(_PAUSE)
        self.engine.close()


class ModelManager:
    """Answers as soon as the golden images came out right, and follows the bundle from then on.

    A manifest that is replaced is loaded beside the one that is served, proved like the first,
    and takes its place between two requests. One that can't be served is refused and told; the
    old one goes on.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        """Nothing is loaded before `load` or `start`."""
        self.settings = settings
        self.telemetry = telemetry
        self.refusal = "the bundle is still being loaded"
        self._model: LoadedModel | None = None
        self._seen: object = None
        self._refused: object = None
        self._closing = threading.Event()
        self._swapping = threading.Lock()

    def start(self) -> None:
        """Load on a thread, if nothing is loaded yet, and watch the bundle."""
        threading.Thread(target=self._watch, name="fledge-watch", daemon=True).start()

    def close(self) -> None:
        """Stop; nobody waits for an answer any more."""
        self._closing.set()
        with self._swapping:
            model, self._model, self.refusal = self._model, None, "the service is stopping"
        if model:
            model.engine.close()

    @property
    def model(self) -> LoadedModel:
        """What is served now.

        Raises:
            NotReady: Nothing yet; `refusal` has the reason, which is for operators. It also has
                why a newer bundle is not served.
        """
        if self._model is None:
            raise NotReady("no model is being served now; GET /readyz says why")
        return self._model

    @contextmanager
    def _held(self) -> Iterator[LoadedModel]:
        """What is served now, kept from being closed when another takes its place meanwhile."""
        model = self.model
        model.users += 1
        while self._model is not model:  # another came before it was known to be held
            model.users -= 1
            model = self.model
            model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    async def answer(self, data: bytes, options: PredictOptions) -> dict[str, Any]:
        """The answer to one image, as `Predictor.answer`.

        Raises:
            FledgeError: Any error of the path: option, image, overload, deadline, not ready.
        """
        with self._held() as model:
            return await self._answer(model, data, options)

    async def _answer(
        self, model: LoadedModel, data: bytes, options: PredictOptions
    ) -> dict[str, Any]:
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
        self, images: Sequence[bytes], options: PredictOptions, request_id: str
    ) -> list[dict[str, Any]]:
        """One answer or {"error": problem} for each image, in order; none touches another.

        Raises:
            FledgeError: The options are wrong or nothing is served: then no image was looked at.
        """
        with self._held() as model:  # one version answers them all
            return await self._answer_each(model, images, options, request_id)

    async def _answer_each(
        self, model: LoadedModel, images: Sequence[bytes], options: PredictOptions, request_id: str
    ) -> list[dict[str, Any]]:
        model.predictor.check(options.tta, options.top_k)
        # A long list takes its turn among the others instead of filling the house.
        turn = asyncio.Semaphore(max(1, self.settings.max_queue // 4))

        async def one(data: bytes) -> dict[str, Any]:
            try:
                async with turn:
                    answer = await self._answer(model, data, options)
            except Exception as error:
                if is_fault(error):
                    _log.exception("request %s failed", request_id)
                self.telemetry.count(code_of(error))
                return {"error": problem(error, request_id)}
            self.telemetry.answered(answer)
            return answer

        return await asyncio.gather(*(one(data) for data in images))

    def load(self) -> None:
        """Load and check the bundle now, and serve it; what goes wrong becomes `refusal`."""
        self._seen = self._state()
        try:
            model = self._build()
        except FledgeError as error:
            self._refuse(str(error))
            return
        except Exception:
            _log.exception("the bundle can't be loaded")
            self._refuse("loading failed; the log says why")
            return
        with self._swapping:
            if self._closing.is_set():
                model.engine.close()
                return
            old, self._model, self.refusal = self._model, model, ""
        self._tell(model, old)
        if old:
            old.close()
            del old
            malloc.trim()
            return
        # What was loaded stays: the collector need not walk it again at every turn. Only now, while
        # nobody asks: of what is frozen no cycle is ever collected, and a failed request is one.
        gc.collect()
        gc.freeze()

    def _build(self) -> LoadedModel:
        settings = self.settings
        predictor = _open(settings)
        engine = build(
            predictor,
            cap=settings.max_batch or predictor.cap,
            threads=settings.threads,
            max_queue=settings.max_queue,
            max_pixels=settings.max_pixels,
            observe=self.telemetry.observe,
        )
        return LoadedModel(predictor, engine, _describe(predictor))

    def _watch(self) -> None:
        if self._seen is None:
            self.load()
        pause, tried = RETRY, time.monotonic()
        while not self._closing.wait(WATCH):
            changed = self._state() != self._seen
            # What could not be read may still be on its way: a folder that is being copied.
            if not changed and not (self.refusal and time.monotonic() - tried > pause):
                continue
            pause = RETRY if changed else min(2 * pause, LONGEST)
            try:
                self.load()
            except Exception:  # whatever it is, the next bundle may be a good one
                _log.exception("the bundle can't be taken over")
            tried = time.monotonic()

    def _state(self) -> object:
        """Differs when the manifest was replaced."""
        try:
            found = (self.settings.bundle / storage.MANIFEST).stat()
        except OSError:
            return ""
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        if (self._seen, reason) == self._refused:
            return  # said already
        self._refused = (self._seen, reason)
        served = f"{self._model.predictor.model} goes on" if self._model else "not serving"
        self.telemetry.refused()
        _log.error("%s: %s", served, reason)

    def _tell(self, model: LoadedModel, old: LoadedModel | None) -> None:
        predictor = model.predictor
        if old and _labels(old.predictor) != _labels(predictor):
            self.telemetry.retired(*_labels(old.predictor))
        self.telemetry.serving(*_labels(predictor), predictor.manifest.labels)
        _log.info(
            "serving %s in %s on %s, %d threads, up to %d rows a run",
            *_labels(predictor),
            self.settings.threads,
            self.settings.max_batch or predictor.cap,
        )


def _labels(predictor: Predictor) -> tuple[str, str, str]:
    return predictor.model, predictor.precision, predictor.runtime.provider


def _open(settings: Settings) -> Predictor:
    # One core a run: several side by side are what fills the cores, while there are several.
    return open_predictor(
        settings.bundle,
        device=settings.device,
        precision=settings.precision,
        threads=1,
        low_latency_runtime=settings.threads,
        kind=settings.runtime,
    )


def _describe(predictor: Predictor) -> bytes:
    """The body of `GET /model`: the manifest, and how it is served here."""
    values = json.loads(predictor.manifest.to_json())
    provider = predictor.runtime.provider
    values["serving"] = {
        "precision": predictor.precision,
        "provider": provider,
        "fledge": __version__,
    }
    return json.dumps(values, ensure_ascii=False).encode()
