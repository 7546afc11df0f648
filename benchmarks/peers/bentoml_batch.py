"""BentoML with adaptive batching, and ONNX Runtime; `bentoml serve bentoml_batch:Classifier`.

Written as in https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html, with BentoML's
default batch size and latency.
"""

from __future__ import annotations

from typing import Any

import bentoml
from network import Network
from PIL.Image import Image as PILImage


@bentoml.service
class Classifier:
    """Takes several photos per call."""

    def __init__(self) -> None:
        self.network = Network()

    @bentoml.api(batchable=True)
    def predict(self, images: list[PILImage]) -> list[dict[str, Any]]:
        """Photos -> the five best classes of each."""
        return self.network([self.network.pixels(image) for image in images])
