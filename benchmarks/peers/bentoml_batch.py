"""BentoML with adaptive batching, and ONNX Runtime; `bentoml serve bentoml_batch:Classifier`.

As https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html has it, with BentoML's
defaults for the size of a batch and for its latency.
"""

from __future__ import annotations

from typing import Any

import bentoml
from network import Network
from PIL.Image import Image as PILImage


@bentoml.service
class Classifier:
    """Several photos a call."""

    def __init__(self) -> None:
        self.network = Network()

    @bentoml.api(batchable=True)
    def predict(self, images: list[PILImage]) -> list[dict[str, Any]]:
        """Photos -> the five best classes of each."""
        return self.network([self.network.pixels(image) for image in images])
