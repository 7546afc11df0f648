"""`serving.service:ImageClassifier`, what `bentoml serve` and `bentoml build` take.

Everything of substance is behind it: `App` is the door, `ModelManager` the core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
import bentoml
from _bentoml_sdk import Service  # type: ignore[import-untyped] # BentoML types its front only

from serving.errors import FledgeError, OptionError
from serving.http import tracing
from serving.http.app import App
from serving.http.forms import PredictOptions
from serving.http.messages import ASGIApp
from serving.http.model_manager import ModelManager
from serving.http.telemetry import Telemetry
from serving.server import fate, launch
from serving.settings import Settings
from serving.utils import malloc


class FrontedService(Service[Any]):  # type: ignore[misc]
    """A BentoML service whose requests meet `App` first."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """The app that a worker runs."""
        return tracing.traced(App(super().to_asgi(is_main), lambda: self._instance.model_manager))

    def __call__(self) -> Any:
        """Make the instance, once a worker."""
        self._instance = super().__call__()
        return self._instance


def _workers() -> int:
    try:
        return Settings.from_env().workers
    except OptionError:
        return 1  # told in full by `check`; a build or an import must not fail for it


@bentoml.service(
    name="image_classifier",
    service_class=FrontedService,
    workers=_workers(),
    traffic={"timeout": 60},
)
class ImageClassifier:
    """Classifies images with the model of a Fledge bundle."""

    def __init__(self) -> None:
        """Begin to load; `/readyz` tells when it is done.

        One of several workers loads before it accepts: whichever answers `/readyz`, none of the
        others takes a request that it can't answer yet.
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
        """Before any worker starts: refuse to start on wrong settings or without a bundle."""
        launch.make_absolute(os.environ)
        fate.watch_workers()
        launch.remove_scratch_at_the_end(os.environ)
        try:
            launch.check(Settings.from_env())
        except FledgeError as error:
            print(f"fledge: {error}", file=sys.stderr)
            raise SystemExit(error.exit_status) from error

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Stop the threads, and send the last spans."""
        self.model_manager.close()
        tracing.flush()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, image: Path, tta: int = 0, top_k: int | None = None) -> dict[str, Any]:
        """Classify one image: multipart field `image`, or the file as the raw body.

        Over HTTP `App` answers this route; declared here, it is in the OpenAPI page and
        BentoML's own client finds it.
        """
        return await self.model_manager.answer(image.read_bytes(), PredictOptions(tta, top_k))

    @bentoml.api(route="/predict/batch")  # type: ignore[untyped-decorator]
    async def predict_batch(
        self, image: list[Path], tta: int = 0, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Classify several images: multipart fields `image`; an answer or error for each."""
        data = [path.read_bytes() for path in image]
        return await self.model_manager.answer_each(data, PredictOptions(tta, top_k), "local")


if not isinstance(ImageClassifier, FrontedService):
    # Without the front BentoML would fetch addresses given as files, and limit nothing.
    raise RuntimeError("this BentoML ignores `service_class`; install the pinned version")
