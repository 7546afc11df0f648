"""Shared by the serving peers: the bundle's graph in ONNX Runtime, as in docs/bundle.md.

Computes the same answer as Fledge's service: centre crop and resize in one pass of Pillow to uint8,
the graph, softmax at the bundle's temperature, the five best labels. Imports nothing of Fledge.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Network:
    """The graph of the bundle PEER_BUNDLE, with PEER_THREADS threads; 0: ONNX Runtime's default."""

    def __init__(self, precision: str = "fp32") -> None:
        bundle = Path(os.environ["PEER_BUNDLE"])
        self.manifest = json.loads((bundle / "manifest.json").read_text())
        file = self.manifest["precisions"][precision]["file"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("PEER_THREADS", "0"))
        self.session = ort.InferenceSession(
            bundle / self.manifest["version"] / file, options, providers=["CPUExecutionProvider"]
        )

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Crop and resize an image: uint8 [size, size, 3]."""
        preprocess = self.manifest["preprocess"]
        image, size = image.convert("RGB"), preprocess["size"]
        side = min(image.size) * preprocess["crop"]
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((size, size), FILTERS[preprocess["interpolation"]], box=box))

    def __call__(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Run the graph once; an answer for each image: uint8 [size, size, 3] each."""
        (logits,) = self.session.run(["logits"], {"pixels": np.stack(images)})
        scaled = logits / self.manifest["temperature"]
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return [self._best(row) for row in powers / powers.sum(axis=1, keepdims=True)]

    def _best(self, probabilities: npt.NDArray[np.float32]) -> dict[str, Any]:
        labels = self.manifest["labels"]
        best = np.argsort(-probabilities)[:5]
        return {
            "predictions": [
                {"label": labels[index], "probability": float(probabilities[index])}
                for index in best
            ]
        }
