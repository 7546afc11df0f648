"""Inference without HTTP: from encoded images to probabilities and JSON answers.

    bytes --prepare--> Prepared --predict--> Prediction --answer--> JSON
           decode, views        graph, average           labels

`prepare` decodes a single image and cuts its TTA views (crops of the image, possibly mirrored).
`predict` runs the graph on a batch of prepared images and averages over the views. `answer` adds
the labels and flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from serving.bundle.manifest import Manifest, measured_max_batch
from serving.errors import OptionError, WorkError
from serving.imaging import decode
from serving.imaging.cost import Cost
from serving.imaging.limits import max_pixels_of_commands
from serving.imaging.preprocess import Pixels
from serving.imaging.tta import (
    Probabilities,
    View,
    average,
    count_views,
    energies,
    render,
    softmax,
)
from serving.inference import runtime

TOP_K: Final = 5
GPU_BATCH: Final = 16
"""Largest batch on a GPU, in rows, if the bundle has no measurement of the best size."""


@dataclass(frozen=True)
class Prepared:
    """A decoded image, ready for the graph.

    Attributes:
        pixels: uint8 [views, size, size, 3], the TTA views (crops or flips) of the image.
        applied: Names of the conversions made while decoding, from `Decoded.applied`.
    """

    pixels: Pixels
    applied: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The model's output for one image.

    Attributes:
        probabilities: float64 [classes], summing to 1, in the order of the labels.
        features: float32 [D], the input of the classifier layer for the plain view.
        energy: -log sum exp of the logits of the plain view. Images unlike the training photos
            have a higher energy (Liu et al., 2020).
        views: Number of TTA views (crops or flips) over which `probabilities` is the average.
        applied: Names of the conversions made while decoding, from `Decoded.applied`.
    """

    probabilities: Probabilities
    features: runtime.Floats
    energy: float
    views: int
    applied: tuple[str, ...]


class Predictor:
    """Predicts images with the graph of a bundle. No state is kept between calls.

    Attributes:
        manifest: Manifest of the bundle.
        runtime: Runtime of the graph.
        low_latency_runtime: Runtime with more threads, or None; see `__init__`.
        precision: Precision of the graph, such as fp32.
        model: Name and version of the model as NAME:VERSION.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: runtime.Runtime,
        precision: str = "fp32",
        low_latency_runtime: runtime.Runtime | None = None,
    ) -> None:
        """Store the manifest and the runtimes without checking them; see `open_predictor`.

        Args:
            manifest: Manifest of the bundle.
            engine: Runtime of the graph.
            precision: Precision of the graph; part of each answer.
            low_latency_runtime: Runtime with more threads than `engine`, used when only one image
                is in progress. None: `engine` runs every image.
        """
        self.manifest = manifest
        self.runtime = engine
        self.low_latency_runtime = low_latency_runtime
        self.precision = precision
        self.model = f"{manifest.name}:{manifest.version}"

    @property
    def cap(self) -> int:
        """Largest batch of one run, in rows (images times TTA views).

        The value was measured at export. Without a measurement, the value is 1 on a CPU and 16 on a
        GPU.
        """
        on_cpu = runtime.on_cpu(self.runtime.provider)
        measured = measured_max_batch(self.manifest, "cpu" if on_cpu else "cuda")
        return measured or (1 if on_cpu else GPU_BATCH)

    def check(self, tta: int = 0, top_k: int | None = None) -> None:
        """Check the options of a request.

        Args:
            tta: Number of TTA views (crops or flips) to average, 0 to the bundle's number of views.
            top_k: Number of classes in the answer, 1 to the number of classes; None: the default.

        Raises:
            OptionError: `tta` or `top_k` is out of range.
        """
        count_views(tta, self.manifest.views)
        classes = len(self.manifest.labels)
        if top_k is not None and not 1 <= top_k <= classes:
            raise OptionError(f"top_k = {top_k}: use 1 to {classes}, the number of classes")

    def estimate(self, data: bytes, tta: int = 0, *, max_pixels: int) -> Cost:
        """Check structure and size of an image; return what `prepare` costs. Nothing is decoded.

        Args:
            data: The encoded image file.
            tta: Number of views to cut, as for `prepare`.
            max_pixels: Largest accepted width times height.

        Raises:
            OptionError: `tta` is out of range.
            ImageError: The image is too large; see `decode.check`.
        """
        views = count_views(tta, self.manifest.views)
        return decode.check(data, max_pixels, views, self.manifest.preprocess)

    def prepare(
        self,
        data: bytes,
        tta: int = 0,
        *,
        max_pixels: int | None = None,
        estimated: Cost | None = None,
    ) -> Prepared:
        """Decode one image and cut its TTA views (crops or flips).

        Args:
            data: The encoded image file.
            tta: Number of views to cut: the first `tta` views in the manifest. 0 and 1 both mean
                the plain view only.
            max_pixels: Largest accepted width times height. None: as `decode`.
            estimated: Result of `estimate`. If given, the image is decoded in this process.

        Raises:
            OptionError: `tta` is out of range.
            LargerThanStated: `estimated` is given, and the image has more pixels than it says.
            ImageError: The image can't be decoded or is too large; see `decode`.
        """
        views, preprocess = self._views(tta), self.manifest.preprocess
        if estimated:
            decoded = decode.decode_here(
                data,
                max_pixels=max_pixels or max_pixels_of_commands(),
                preprocess=preprocess,
                stated=estimated,
            )
        else:
            decoded = decode.decode(data, max_pixels=max_pixels, preprocess=preprocess)
        pixels = render(decoded.image, preprocess, views, decoded.area)
        return Prepared(pixels, decoded.applied)

    def prepare_isolated(
        self,
        data: bytes,
        tta: int,
        *,
        max_pixels: int,
        memory: int,
        too_large: str,
        cancelled: Callable[[], bool] = bool,
    ) -> Prepared:
        """As `prepare`, in a process of its own, which is stopped when `cancelled` returns True.

        Args:
            data: The encoded image file.
            tta: Number of views to cut.
            max_pixels: Largest accepted width times height.
            memory: Bytes that decoding may take.
            too_large: Message where it needs more.
            cancelled: Function that returns True once the image is no longer needed.

        Raises:
            ImageError: As `prepare`. `TooLarge`: decoding needed more memory than `memory`.
            Cancelled: `cancelled` returned True.
        """
        preprocess = self.manifest.preprocess
        request = {
            "max_pixels": max_pixels,
            "too_large": too_large,
            "preprocess": preprocess.to_dict(),
            "views": self._views(tta),
        }
        answer = decode.decoders.decode(data, request, memory=memory, cancelled=cancelled)
        return Prepared(answer.pixels, answer.applied)

    def _views(self, tta: int) -> Sequence[View]:
        views = self.manifest.views
        return views[: count_views(tta, views)]

    def predict(
        self,
        prepared: Sequence[Prepared],
        *,
        low_latency: bool = False,
        max_rows: int | None = None,
    ) -> list[Prediction]:
        """Predict a batch of images.

        The probabilities of an image are the average over the TTA views (crops or flips).

        Args:
            prepared: Images from `prepare`.
            low_latency: Whether to use `low_latency_runtime`, if there is one. Pass True
                only while no other work needs the CPU cores.
            max_rows: Largest number of rows (images times views) of one run of the graph. What is
                between the layers takes memory for each row, and the runtime keeps it. None: all
                rows in one run.

        Raises:
            WorkError: The runtime failed, or a logit is not finite.
        """
        if not prepared:
            return []
        rows = [item.pixels for item in prepared]
        engine = self.runtime
        if low_latency and self.low_latency_runtime:
            engine = self.low_latency_runtime
        pixels = rows[0] if len(rows) == 1 else np.concatenate(rows)
        if max_rows is None or len(pixels) <= max_rows:
            logits, features = engine.run(pixels)
        else:
            starts = range(0, len(pixels), max_rows)
            runs = [engine.run(pixels[start : start + max_rows]) for start in starts]
            logits, features = (np.concatenate(outputs) for outputs in zip(*runs, strict=True))
        if not np.isfinite(logits).all():
            raise WorkError(f"{self.model} gave logits that are not finite")
        probabilities = softmax(logits, self.manifest.temperature)
        ends = np.cumsum([len(item.pixels) for item in prepared])
        firsts = np.concatenate(([0], ends[:-1]))
        plain_energies = energies(logits[firsts])
        return [
            Prediction(
                average(own, self.manifest.average),
                features[first],
                float(energy),
                len(item.pixels),
                item.applied,
            )
            for item, own, first, energy in zip(
                prepared, np.split(probabilities, ends[:-1]), firsts, plain_energies, strict=True
            )
        ]

    def answer(self, prediction: Prediction, top_k: int | None = None) -> dict[str, Any]:
        """Return the answer for one image as the JSON object that `POST /predict` sends.

        Args:
            prediction: Prediction of the image.
            top_k: Number of classes in the answer. None: five classes, or all classes if the model
                has fewer than five.

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


class Predict(Protocol):
    """Signature of `Predictor.predict`."""

    def __call__(self, prepared: list[Prepared], *, low_latency: bool) -> list[Prediction]: ...
