"""Encoded images -> probabilities -> the answer. The whole of inference without HTTP.

    bytes --prepare--> Prepared --predict--> Prediction --answer--> JSON
           decode, views        graph, average           labels

`prepare` refuses a bad image alone, before it meets others; `predict` runs many together.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving import bundle, images, runtime, views
from serving.buckets import Bucketed
from serving.errors import BundleError, ImageError, OptionError, WorkError
from serving.manifest import Manifest
from serving.preprocess import Pixels
from serving.views import Probabilities

TOP_K: Final = 5
GPU_CAP: Final = 16
"""Rows of one run on a GPU where the bundle states no tuning."""
MAX_TOLERANCE: Final = 0.05
"""A golden answer may be off by a tolerance of at most this; more would check nothing."""


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
        self, manifest: Manifest, engine: runtime.Runtime, precision: str = "fp32"
    ) -> None:
        """Join what `open_predictor` opened; `precision` is what answers report."""
        self.manifest = manifest
        self.runtime = engine
        self.precision = precision
        self.model = f"{manifest.name}:{manifest.version}"

    @property
    def cap(self) -> int:
        """Rows of one run: the bundle's tuning for this device, else 1 on a CPU, 16 on a GPU."""
        on_cpu = self.runtime.provider == runtime.PROVIDERS["cpu"]
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

    def predict(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        """One run of the graph over all rows, then the mean over each image's own views.

        Raises:
            WorkError: The engine failed or gave numbers that are not finite.
        """
        if not prepared:
            return []
        rows = [item.pixels for item in prepared]
        logits, features = self.runtime.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
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


def open_predictor(
    folder: Path, *, device: str = "auto", precision: str = "auto", threads: int = 1
) -> Predictor:
    """Open a bundle and prove that it answers here as it did at export.

    Args:
        folder: The bundle.
        device: As `OnnxRuntime`.
        precision: fp32, int8 or fp16; auto takes int8 on a CPU and fp16 on a GPU where the bundle
            keeps them, else fp32.
        threads: Cores that one run uses on a CPU.

    Raises:
        BundleError: Missing, changed, or the golden images give other answers than the manifest's.
        OptionError: The device is not there, or the bundle lacks the precision.
    """
    opened = bundle.read(folder)
    have = opened.manifest.precisions
    chosen = choose(opened, precision, runtime.expected(device))
    engine = _engine(opened, chosen, device, threads)
    if precision == "auto" and chosen != _fastest(have, engine.provider):
        # A GPU was seen, did not load, and auto fell back: now the CPU's own choice.
        chosen = _fastest(have, engine.provider)
        engine = _engine(opened, chosen, "cpu", threads)
    shaped: runtime.Runtime = engine
    if engine.provider != runtime.PROVIDERS["cpu"]:
        shaped = Bucketed(engine, opened.manifest.preprocess.size)
    predictor = Predictor(opened.manifest, shaped, chosen)
    check_golden(predictor, opened)
    return predictor


def choose(opened: bundle.Bundle, precision: str, provider: str) -> str:
    """The precision that `open_predictor` takes with a provider.

    Raises:
        OptionError: The bundle lacks it.
    """
    have = opened.manifest.precisions
    if precision not in ("auto", *have):
        raise OptionError(
            f"precision = {precision}: {opened.folder} has {', '.join(have)}; use one"
        )
    return _fastest(have, provider) if precision == "auto" else precision


def check_golden(predictor: Predictor, opened: bundle.Bundle) -> None:
    """Compare golden images with the probabilities that the manifest states for this precision.

    Raises:
        BundleError: There are none, the engine fails on them, or an answer is off by more than the
            stated tolerance, which itself must be small enough to mean something.
    """
    manifest, precision = opened.manifest, predictor.precision
    if not manifest.golden:
        raise BundleError(f"{opened.folder} has no golden images to check; export it again")
    try:
        tolerance = float(manifest.precisions[precision]["tolerance"])
        stated = [
            (str(item["file"]), np.asarray(item["probabilities"][precision], np.float64))
            for item in manifest.golden
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{opened.folder} states no golden answers for {precision}; export it again"
        ) from error
    if not 0 < tolerance <= MAX_TOLERANCE:
        raise BundleError(
            f"{opened.folder}: tolerance {tolerance:.2g} of {precision} is not above 0 and at most "
            f"{MAX_TOLERANCE}; export it again"
        )
    for name, expected in stated:
        if expected.shape != (len(manifest.labels),):
            raise BundleError(
                f"{opened.folder}: {name} has {expected.size} probabilities stated for "
                f"{len(manifest.labels)} labels"
            )
        try:
            prepared = predictor.prepare(opened.load(name))
        except ImageError as error:
            raise BundleError(f"{opened.payload / name} can't be read: {error}") from error
        try:
            actual = predictor.predict([prepared])[0].probabilities
        except WorkError as error:
            raise BundleError(f"{opened.folder} must not be served here: {error}") from error
        if actual.shape != expected.shape:
            raise BundleError(
                f"{opened.folder}: the graph gives {actual.size} probabilities for "
                f"{len(manifest.labels)} labels"
            )
        off = float(np.abs(actual - expected).max())
        if not off <= tolerance:
            raise BundleError(
                f"{opened.folder} must not be served here: {name} in {precision} on "
                f"{predictor.runtime.provider} is off by {off:.2g}, tolerance {tolerance:.2g}"
            )


def _engine(
    opened: bundle.Bundle, precision: str, device: str, threads: int
) -> runtime.OnnxRuntime:
    path = opened.graph(precision)
    data = opened.load(path.relative_to(opened.payload).as_posix())
    return runtime.OnnxRuntime(path, device=device, threads=threads, data=data)


def _fastest(have: Container[str], provider: str) -> str:
    """int8 pays on CPUs, fp16 on GPUs; the export keeps them only where accuracy allows."""
    faster = "int8" if provider == runtime.PROVIDERS["cpu"] else "fp16"
    return faster if faster in have else "fp32"
