"""Load the bundle that is served, and load it again when its manifest file changes."""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from serving import __version__
from serving.bundle import storage
from serving.errors import BundleError, FledgeError, NotReady
from serving.http.body_budget import BodyBudget
from serving.http.telemetry import Telemetry
from serving.inference import isolated_load
from serving.inference.decoding import DecodingBudget
from serving.inference.isolated_load import LoadStopped
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from serving.inference.scheduling import Engine, build_engine
from serving.server import memory_needs
from serving.settings import Settings
from serving.terminal import escape
from serving.utils import malloc
from serving.utils.memory import resident_bytes

WATCH_SECONDS: Final = 1.0
"""Time between two checks of the manifest."""
FIRST_RETRY_SECONDS: Final = 10.0
MAX_RETRY_SECONDS: Final = 300.0
"""Least and largest time until a refused bundle is tried again. The time doubles with each attempt.
"""
_SLOW_SECONDS: Final = 5.0
"""A load that takes longer is stopped when a newer bundle is published, and seldom repeated."""
_RELEASE_POLL_SECONDS: Final = 0.02

_log = logging.getLogger("bentoml.fledge")


@dataclass
class LoadedModel:
    """A loaded bundle: its predictor, and the engine that runs the predictor.

    Attributes:
        predictor: Predictor of the bundle.
        engine: Queue and threads that run the predictor on the images of requests.
        manifest: Body of the response to `GET /model`.
        users: Number of requests that use the model; changed only in the event loop's thread.
    """

    predictor: Predictor
    engine: Engine
    manifest: bytes
    users: int = 0

    def close(self) -> None:
        """Wait until no request uses the model, then stop the engine."""
        while self.users:
            time.sleep(_RELEASE_POLL_SECONDS)
        self.engine.close()


class ModelManager:
    """Owner of the served model: loads it, and replaces it when the bundle's manifest changes.

    A model is served only if it predicts the expected probabilities of the golden images (photos in
    the bundle whose expected probabilities are in the manifest). When the manifest file changes, a
    thread loads and checks the new model while the current model is still served. If the check
    passes, new requests use the new model. If the check fails, the current model stays.

    Attributes:
        settings: Settings of the service.
        telemetry: Metrics and access log.
        refusal: Why the newest bundle is not served; "" if it is served.
        memory: Bytes for the bodies of requests and for decoding; 0 until a model is loaded.
        bodies: Budget of the bodies of requests, a quarter of `memory`.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        """Store the arguments; `load` or `start` loads the bundle."""
        self.settings = settings
        self.telemetry = telemetry
        self.refusal = "the bundle is still being loaded"
        self.memory = 0
        self.bodies = BodyBudget((settings.max_memory or memory_needs.LEAST_MEMORY) // 4)
        self._budget: DecodingBudget | None = None
        self._model: LoadedModel | None = None
        self._manifest_state: object = None
        self._logged_refusal: object = None
        self._closing = threading.Event()
        self._swap_lock = threading.Lock()

    def start(self) -> None:
        """Start a thread that loads the bundle and then watches its manifest file for changes.

        A bundle that `load` has already loaded is not loaded again.
        """
        threading.Thread(target=self._watch, name="fledge-watch", daemon=True).start()

    def close(self) -> None:
        """Stop the threads; call this method when no prediction is in progress."""
        self._closing.set()
        with self._swap_lock:
            model, self._model, self.refusal = self._model, None, "the service is stopping"
        if model:
            model.engine.close()

    @property
    def model(self) -> LoadedModel:
        """The model that is served now.

        Raises:
            NotReady: No model is loaded. The message leaves out `refusal`, which may contain paths
                that clients must not see.
        """
        if self._model is None:
            raise NotReady("no model is being served now; GET /readyz says why")
        return self._model

    @contextmanager
    def acquire(self) -> Iterator[LoadedModel]:
        """Yield the served model, which stays open during the `with` block.

        A model that is replaced meanwhile is closed after the block.

        Raises:
            NotReady: No model is loaded.
        """
        model = self.model
        model.users += 1
        while self._model is not model:  # replaced before `users` was increased
            model.users -= 1
            model = self.model
            model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    def load(self) -> None:
        """Load and check the bundle, and serve it from now on.

        If the bundle can't be served, no exception is raised: the current model stays, and
        `refusal` has the reason.
        """
        self._manifest_state = self._read_manifest_state()
        try:
            model = self._build(self._try_in_child())
        except LoadStopped:
            return
        except FledgeError as error:
            self._refuse(error.public, error.details)
            return
        except Exception:
            _log.exception("the bundle can't be loaded")
            self._refuse("loading failed; the log says why")
            return
        with self._swap_lock:
            if self._closing.is_set():
                model.engine.close()
                return
            old, self._model, self.refusal = self._model, model, ""
        self._report(model, old)
        if old:
            old.close()
            del old
            malloc.trim()
            return
        # Exclude the loaded modules from garbage collection. Only before the first request, because
        # frozen objects are never collected and a failed request leaves a reference cycle.
        gc.collect()
        gc.freeze()

    def _try_in_child(self) -> str:
        """Load the bundle in a child process first, with limits of time and memory.

        Returns:
            The version that was loaded; "" if the bundle was tried before.

        Raises:
            BundleError, OptionError: The bundle can't be served.
            LoadStopped: The service ends, or the load takes long and a newer bundle was published.
        """
        started = time.monotonic()

        def stop() -> bool:
            late = time.monotonic() - started > _SLOW_SECONDS
            return self._closing.is_set() or (
                late and self._read_manifest_state() != self._manifest_state
            )

        settings = self.settings
        if self._model is None and settings.device in ("cuda", "tensorrt"):
            return ""  # `preflight.check_gpu` has done it
        (version,) = isolated_load.run(
            "open_predictor",
            settings.bundle,
            seconds=settings.load_timeout,
            share=settings.workers,
            stop=stop,
            **_load_options(settings),
        )
        return version

    def _build(self, tried: str) -> LoadedModel:
        settings = self.settings

        def check_version(bundle: storage.Bundle) -> None:
            if tried and bundle.manifest.version != tried:
                raise BundleError(f"{settings.bundle} was replaced while it was loaded")

        # The graph of a bundle that was loaded in the child process may draw random numbers, and
        # take longer here.
        seconds = settings.load_timeout or isolated_load.load_seconds(settings.device)
        if self._model:
            memory_needs.check_update(settings, storage.read(settings.bundle).manifest)
        predictor = open_predictor(
            settings.bundle,
            golden_seconds=seconds,
            before_load=check_version,
            **_load_options(settings),
        )
        if self._budget is None:  # at a later load, requests in progress have memory too
            manifest = predictor.manifest
            base = max(0, resident_bytes() - memory_needs.model_bytes(settings, manifest))
            self.memory = memory_needs.request_memory(settings, manifest, base)
            self.bodies.total = self.memory // 4
            self._budget = DecodingBudget.of(self.memory - self.bodies.total)
        engine = build_engine(
            predictor,
            cap=settings.max_batch or predictor.cap,
            threads=settings.threads,
            max_queue=settings.max_queue,
            max_pixels=settings.max_pixels,
            budget=self._budget,
            observe=self.telemetry.observe,
        )
        return LoadedModel(predictor, engine, _describe(predictor))

    def _watch(self) -> None:
        if self._manifest_state is None:
            self.load()
        pause, last_try = FIRST_RETRY_SECONDS, time.monotonic()
        while not self._closing.wait(WATCH_SECONDS):
            changed = self._read_manifest_state() != self._manifest_state
            # Try a refused bundle again, because its folder may have been incomplete.
            if not changed and not (self.refusal and time.monotonic() - last_try > pause):
                continue
            pause = FIRST_RETRY_SECONDS if changed else 2 * pause
            started = time.monotonic()
            try:
                self.load()
            except Exception:  # the thread must continue: the next bundle may be valid
                _log.exception("the new bundle can't be served")
            last_try = time.monotonic()
            if last_try - started > _SLOW_SECONDS:  # slow attempts are rare: they take a core
                pause = max(pause, 10 * (last_try - started))
            pause = min(pause, MAX_RETRY_SECONDS)

    def _read_manifest_state(self) -> object:
        """Return a value that changes when the manifest file is replaced."""
        try:
            status = (self.settings.bundle / storage.MANIFEST).stat()
        except OSError:
            return ""
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _refuse(self, reason: str, details: str = "") -> None:
        """Store and log the reason. Only the log gets `details`."""
        self.refusal = reason
        if (self._manifest_state, reason) == self._logged_refusal:
            return
        self._logged_refusal = (self._manifest_state, reason)
        current = (
            f"still serving {escape(self._model.predictor.model)}" if self._model else "not serving"
        )
        self.telemetry.refused()
        _log.error("%s: %s", current, f"{reason}: {escape(details)}" if details else reason)

    def _report(self, model: LoadedModel, old: LoadedModel | None) -> None:
        predictor = model.predictor
        if old and _labels(old.predictor) != _labels(predictor):
            self.telemetry.retired(*_labels(old.predictor))
        self.telemetry.serving(*_labels(predictor), predictor.manifest.labels)
        _log.info(
            "serving %s in %s on %s, %d threads, up to %d rows a run, %d MB for requests",
            *map(escape, _labels(predictor)),
            self.settings.threads,
            self.settings.max_batch or predictor.cap,
            self.memory >> 20,
        )


def _labels(predictor: Predictor) -> tuple[str, str, str]:
    return predictor.model, predictor.precision, predictor.runtime.provider


def _load_options(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `open_predictor`."""
    # One thread per run, because concurrent runs use all cores when several images are in progress.
    return {
        "device": settings.device,
        "precision": settings.precision,
        "threads": 1,
        "low_latency_threads": settings.threads,
        "kind": settings.runtime,
    }


def _describe(predictor: Predictor) -> bytes:
    """Return the body of `GET /model`: the manifest, and the precision and provider in use."""
    values = json.loads(predictor.manifest.to_json())
    provider = predictor.runtime.provider
    values["serving"] = {
        "precision": predictor.precision,
        "provider": provider,
        "fledge": __version__,
    }
    return json.dumps(values, ensure_ascii=False).encode()
