"""BentoML and ONNX Runtime; run by `bentoml serve bentoml_image:Classifier`.

The image parameter as in https://docs.bentoml.com/en/latest/build-with-bentoml/iotypes.html, in a
service with BentoML's defaults: one worker, one thread.
"""

from __future__ import annotations

from typing import Any

import bentoml
from network import Network
from PIL.Image import Image as PILImage


@bentoml.service
class Classifier:
    """Takes one photo per call."""

    def __init__(self) -> None:
        self.network = Network()

    @bentoml.api
    def predict(self, image: PILImage) -> dict[str, Any]:
        """One photo -> the five best classes."""
        return self.network([self.network.pixels(image)])[0]
