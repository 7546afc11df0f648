"""Inference without HTTP: encoded images -> probabilities -> the JSON of the answer.

    bytes --prepare--> Prepared --predict--> Prediction --answer--> JSON
           decode, views        graph, average           labels

A view is one crop of an image, possibly mirrored. `prepare` raises the errors of a single image;
`predict` runs a batch of prepared images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from serving.bundle.manifest import Manifest
from serving.errors import OptionError, WorkError
from serving.imaging.decode import MAX_PIXELS, decode
from serving.imaging.preprocess import Pixels
from serving.imaging.tta import Probabilities, average, count_views, energies, render, softmax
from serving.inference import runtime

TOP_K: Final = 5
GPU_BATCH: Final = 16
"""Largest batch on a GPU if the bundle has no tuning for it."""


@dataclass(frozen=True)
class Prepared:
    """Input of the graph for one image.

    pixels: uint8 [views, size, size, 3].
    applied: conversions of the image, from `Decoded.applied`.
    """

    pixels: Pixels
    applied: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The model's output for one image.

    Attributes:
        probabilities: float64 [classes], summing to 1, in the order of the labels.
        features: float32 [D] of the plain view: the head's input.
        energy: -log sum exp of the plain view's logits; higher for images unlike the training
            photos (Liu et al., 2020).
        views: Number of views that were averaged.
        applied: Conversions of the image, from `Decoded.applied`.
    """

    probabilities: Probabilities
    features: runtime.Floats
    energy: float
    views: int
    applied: tuple[str, ...]


class Predictor:
    """A bundle's manifest and a runtime of its graph. Holds no state between calls."""

    def __init__(
        self,
        manifest: Manifest,
        engine: runtime.Runtime,
        precision: str = "fp32",
        low_latency_runtime: runtime.Runtime | None = None,
    ) -> None:
        """Store the manifest and the runtimes; `open_predictor` also checks them.

        Args:
            manifest: The bundle's manifest.
            engine: Runs the graph.
            precision: Precision of the graph, which answers report.
            low_latency_runtime: Runs the graph on more threads, for an image while no other image
                is in progress; None: `engine` runs all images.
        """
        self.manifest = manifest
        self.runtime = engine
        self.low_latency_runtime = low_latency_runtime
        self.precision = precision
        self.model = f"{manifest.name}:{manifest.version}"

    @property
    def cap(self) -> int:
        """Largest batch, in rows: from the bundle's tuning, else 1 on a CPU and 16 on a GPU."""
        on_cpu = runtime.on_cpu(self.runtime.provider)
        tuning = self.manifest.tuning.get("cpu" if on_cpu else "cuda", {})
        return max(1, int(tuning.get("max_batch", 1 if on_cpu else GPU_BATCH)))

    def check(self, tta: int = 0, top_k: int | None = None) -> None:
        """Check options before any work is done.

        Raises:
            OptionError: A value is out of range.
        """
        count_views(tta, self.manifest.views)
        classes = len(self.manifest.labels)
        if top_k is not None and not 1 <= top_k <= classes:
            raise OptionError(f"top_k = {top_k}: use 1 to {classes}, the number of classes")

    def prepare(self, data: bytes, tta: int = 0, *, max_pixels: int = MAX_PIXELS) -> Prepared:
        """Decode one image and cut its views.

        Args:
            data: The encoded file's bytes.
            tta: Number of the bundle's views; 0 and 1 mean the plain one.
            max_pixels: Largest accepted width times height.

        Raises:
            OptionError: `tta` is out of range.
            ImageError: What `decode` raises.
        """
        preprocess, views = self.manifest.preprocess, self.manifest.views
        views = views[: count_views(tta, views)]
        decoded = decode(data, max_pixels=max_pixels, background=preprocess.background)
        return Prepared(render(decoded.image, preprocess, views), decoded.applied)

    def predict(
        self, prepared: Sequence[Prepared], *, low_latency: bool = False
    ) -> list[Prediction]:
        """Run the graph once on all rows, then average over each image's views.

        Args:
            prepared: Images from `prepare`.
            low_latency: Use `low_latency_runtime` if there is one. For calls while no other work
                needs the cores.

        Raises:
            WorkError: The runtime failed or gave logits that are not finite.
        """
        if not prepared:
            return []
        rows = [item.pixels for item in prepared]
        engine = self.runtime
        if low_latency and self.low_latency_runtime:
            engine = self.low_latency_runtime
        logits, features = engine.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
        if not np.isfinite(logits).all():
            raise WorkError(f"{self.model} gave logits that are not finite")
        probabilities = softmax(logits, self.manifest.temperature)
        ends = np.cumsum([len(item.pixels) for item in prepared])
        starts = np.concatenate(([0], ends[:-1]))
        plain_energies = energies(logits[starts])
        return [
            Prediction(
                average(own, self.manifest.average),
                features[start],
                float(energy),
                len(item.pixels),
                item.applied,
            )
            for item, own, start, energy in zip(
                prepared, np.split(probabilities, ends[:-1]), starts, plain_energies, strict=True
            )
        ]

    def answer(self, prediction: Prediction, top_k: int | None = None) -> dict[str, Any]:
        """The JSON of `POST /predict`.

        Args:
            prediction: The prediction of one image.
            top_k: Number of classes; None means five, or all if there are fewer.

        Raises:
            OptionError: `top_k` is out of range.
        """
        self.check(top_k=top_k)
        labels, probabilities = self.manifest.labels, prediction.probabilities
        # A stable sort breaks ties by the order of the labels on every machine.
        best = np.argsort(-probabilities, kind="stable")[: top_k or TOP_K]
        confident = self.manifest.thresholds.get("confident")
        energy = self.manifest.thresholds.get("energy")
        return {
            "predictions": [
                {"label": labels[index], "probability": float(probabilities[index])}
                for index in best
            ],
            "model": self.model,
            "precision": self.precision,
            "views": prediction.views,
            "confident": None if confident is None else bool(probabilities.max() >= confident),
            "out_of_distribution": None if energy is None else prediction.energy > energy,
            "applied": list(prediction.applied),
        }
