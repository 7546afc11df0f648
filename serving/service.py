"""The BentoML service `serving.service:ImageClassifier`, which `bentoml serve` and `build` load.

The service connects BentoML to `App`, the ASGI app that answers HTTP requests, and to
`ModelManager`, which loads the bundle and replaces the model when a new version is published.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
import bentoml

from serving.errors import FledgeError, OptionError
from serving.http import forms, problems
from serving.http.app import App
from serving.http.forms import PredictOptions
from serving.http.messages import ASGIApp
from serving.http.model_manager import ModelManager
from serving.http.predict import predict_image, predict_images
from serving.http.telemetry import Telemetry, flush_spans, traced
from serving.server import bentoml_compat, launch, openapi, preflight
from serving.server.shutdown import watch_workers
from serving.settings import Settings
from serving.terminal import show
from serving.utils import malloc


class AppService(bentoml_compat.service_class()):  # type: ignore[misc]
    """A BentoML service that puts `App` in front of BentoML's own app."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """Return the ASGI app that a worker runs."""
        return traced(App(super().to_asgi(is_main), lambda: self._instance.model_manager))

    @property
    def openapi_spec(self) -> Any:
        """The OpenAPI document, with all ways to send an image, and the errors."""
        return openapi.complete(
            super().openapi_spec,
            problem_type=problems.MEDIA_TYPE,
            max_images=forms.MAX_PARTS,
        )

    def __call__(self) -> Any:
        """Create the instance of `ImageClassifier`; BentoML calls this once per worker."""
        self._instance = super().__call__()
        return self._instance


def _workers() -> int:
    try:
        return Settings.from_env().workers
    except OptionError:
        return 1  # `check` reports the error; a build or an import must not fail because of it


@bentoml.service(
    name="image_classifier",
    service_class=AppService,
    workers=_workers(),
    # BentoML keeps about 5 KB of each request that it answers, such as /livez, for this time.
    traffic={"timeout": 10},
)
class ImageClassifier:
    """Classifies images with the model of a Fledge bundle."""

    def __init__(self) -> None:
        """Start loading the bundle; `/readyz` answers 200 once the bundle is loaded.

        With one worker, the bundle is loaded in a thread. With several workers, every worker loads
        the bundle before it accepts connections. Otherwise, after one worker has answered
        `/readyz` with 200, a request could reach another worker that has no model yet.
        """
        malloc.return_large_blocks()
        settings = Settings.from_env()
        self.model_manager = ModelManager(settings, Telemetry())
        if settings.workers > 1:
            self.model_manager.load()
        self.model_manager.start()

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Check settings and bundle before any worker starts; exit if the check fails."""
        launch.make_paths_absolute(os.environ)
        watch_workers()
        launch.remove_scratch_at_exit(os.environ)
        try:
            preflight.check(Settings.from_env())
        except FledgeError as error:
            show(f"fledge: {error}", sys.stderr)
            raise SystemExit(error.exit_status) from error

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Stop the threads, and export the last OpenTelemetry spans."""
        self.model_manager.close()
        flush_spans()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, image: Path, tta: int = 0, top_k: int | None = None) -> dict[str, Any]:
        """Classify one image: multipart field `image`, or the file as the raw body.

        `App` answers this route over HTTP. It is declared here for the OpenAPI page and for
        BentoML's own client.
        """
        options = PredictOptions(tta, top_k)
        return await predict_image(self.model_manager, image.read_bytes(), options)

    @bentoml.api(route="/predict/batch")  # type: ignore[untyped-decorator]
    async def predict_batch(
        self, image: list[Path], tta: int = 0, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Classify several images: multipart fields `image`; an answer or error for each."""
        images = [path.read_bytes() for path in image]
        options = PredictOptions(tta, top_k)
        return await predict_images(self.model_manager, images, options, "local")


if not isinstance(ImageClassifier, AppService):
    # Without `App`, BentoML would download addresses that clients send in place of files, and would
    # apply no limits.
    raise RuntimeError("this BentoML ignores `service_class`; install the pinned version")
