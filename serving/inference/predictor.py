"""Encoded images -> probabilities -> the answer. The whole of inference without HTTP.

    bytes --prepare--> Prepared --predict--> Prediction --answer--> JSON
           decode, views        graph, average           labels

`prepare` refuses a bad image alone, before it meets others; `predict` runs many together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from serving.bundle.manifest import Manifest
from serving.errors import OptionError, WorkError
from serving.imaging import decode as images
from serving.imaging import tta as views
from serving.imaging.preprocess import Pixels
from serving.imaging.tta import Probabilities
from serving.inference import runtime

TOP_K: Final = 5
GPU_CAP: Final = 16
"""Rows of one run on a GPU where the bundle states no tuning."""


@dataclass(frozen=True)
class Prepared:
    """An image on its way to the graph.

    pixels: uint8 [views, size, size, 3]; applied: what was done to the image beyond decoding.
    """

    pixels: Pixels
    applied: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """What the model thinks of one image.

    probabilities: float64 [classes], summing to 1, in the order of the labels.
    features: float32 [D] of the plain view: the head's input.
    energy: -log sum exp of the plain view's logits: the higher, the stranger (Liu et al., 2020).
    views: how many were averaged.
    """

    probabilities: Probabilities
    features: runtime.Floats
    energy: float
    views: int
    applied: tuple[str, ...]


class Predictor:
    """A bundle's manifest and a runtime that has its graph. Holds no state between calls."""

    def __init__(
        self,
        manifest: Manifest,
        engine: runtime.Runtime,
        precision: str = "fp32",
        low_latency_runtime: runtime.Runtime | None = None,
    ) -> None:
        """Join what `open_predictor` opened.

        Args:
            manifest: Of the bundle.
            engine: Runs its graph.
            precision: What answers report.
            wide: Runs it on more cores, for images that are alone; None has `engine` do that.
        """
        self.manifest = manifest
        self.runtime = engine
        self.low_latency_runtime = low_latency_runtime
        self.precision = precision
        self.model = f"{manifest.name}:{manifest.version}"

    @property
    def cap(self) -> int:
        """Rows of one run: the bundle's tuning for this device, else 1 on a CPU, 16 on a GPU."""
        on_cpu = runtime.on_cpu(self.runtime.provider)
        tuning = self.manifest.tuning.get("cpu" if on_cpu else "cuda", {})
        return max(1, int(tuning.get("max_batch", 1 if on_cpu else GPU_CAP)))

    def check(self, tta: int = 0, top_k: int | None = None) -> None:
        """Refuse options before any work is done for them.

        Raises:
            OptionError: More views or classes than there are, or fewer than none.
        """
        views.count(tta, self.manifest.views)
        classes = len(self.manifest.labels)
        if top_k is not None and not 1 <= top_k <= classes:
            raise OptionError(f"top_k = {top_k}: use 1 to {classes}, the number of classes")

    def prepare(
        self, data: bytes, tta: int = 0, *, max_pixels: int = images.MAX_PIXELS
    ) -> Prepared:
        """Decode one image and cut its views.

        Args:
            data: The encoded file's bytes.
            tta: How many of the bundle's views; 0 and 1 mean the plain one.
            max_pixels: Width times height that is still accepted.

        Raises:
            OptionError: `tta` is out of range.
            EmptyBody, ImageError: As `images.decode`.
        """
        preprocess, known = self.manifest.preprocess, self.manifest.views
        wanted = known[: views.count(tta, known)]
        decoded = images.decode(data, max_pixels=max_pixels, background=preprocess.background)
        return Prepared(views.render(decoded.image, preprocess, wanted), decoded.applied)

    def predict(self, prepared: Sequence[Prepared], *, alone: bool = False) -> list[Prediction]:
        """One run of the graph over all rows, then the mean over each image's own views.

        Args:
            prepared: By `prepare`.
            alone: Nobody else needs the cores now: take all, where that is quicker.

        Raises:
            WorkError: The engine failed or gave numbers that are not finite.
        """
        if not prepared:
            return []
        rows = [item.pixels for item in prepared]
        engine = self.low_latency_runtime if alone and self.low_latency_runtime else self.runtime
        logits, features = engine.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
        if not np.isfinite(logits).all():
            raise WorkError(f"{self.model} gave logits that are not finite")
        probabilities = views.softmax(logits, self.manifest.temperature)
        ends = np.cumsum([len(item.pixels) for item in prepared])
        starts = np.concatenate(([0], ends[:-1]))
        energies = views.energies(logits[starts])
        return [
            Prediction(
                views.average(own, self.manifest.average),
                features[start],
                float(energy),
                len(item.pixels),
                item.applied,
            )
            for item, own, start, energy in zip(
                prepared, np.split(probabilities, ends[:-1]), starts, energies, strict=True
            )
        ]

    def answer(self, prediction: Prediction, top_k: int | None = None) -> dict[str, Any]:
        """The JSON of `POST /predict`.

        Args:
            prediction: Of one image.
            top_k: How many classes; None means five, or all where there are fewer.

        Raises:
            OptionError: `top_k` is out of range.
        """
        self.check(top_k=top_k)
        labels, probabilities = self.manifest.labels, prediction.probabilities
        # A stable sort breaks ties by the order of the labels, on every machine.
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
