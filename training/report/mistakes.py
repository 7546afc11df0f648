"""Collect the report's data on mistakes: worst photos, confused classes, confusion matrix."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from serving.errors import ImageError
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from training.evaluation import metrics
from training.evaluation.evaluate import EvaluationResult
from training.report import charts
from training.utils.console import Log

THUMBNAIL: Final = 176
"""Side of a photo on the page, in pixels."""
PHOTOS: Final = 24
"""Most photos in a gallery."""
CLASSES: Final = 40
"""Most classes in the confusion matrix."""


class GalleryPhoto(NamedTuple):
    """A photo in a gallery of the report.

    Attributes:
        picture: JPEG as a data URL.
        file: File name.
        actual, predicted: Names of the actual and of the predicted class.
        confidence: Probability of the predicted class.
        other: The second most probable class if the prediction is right, else the actual class.
        other_confidence: Probability of `other`.
        loss: Cross-entropy.
    """

    picture: str
    file: str
    actual: str
    predicted: str
    confidence: float
    other: str
    other_confidence: float
    loss: float

    @property
    def right(self) -> bool:
        return self.predicted == self.actual


def section(result: EvaluationResult, preprocess: Preprocess, log: Log) -> dict[str, Any]:
    """Return the template's values for the report's section on mistakes.

    Photos that can't be read are left out and logged.
    """
    probabilities, labels = result.probabilities, result.labels
    predicted = probabilities.argmax(axis=1)
    matrix = metrics.confusion(predicted, labels, len(result.classes))
    worst = metrics.top_losses(probabilities, labels, len(labels))
    worst = worst[predicted[worst] != labels[worst]][:PHOTOS]
    shown = _most_involved(matrix)
    which_classes = "" if len(shown) == len(matrix) else f", the {len(shown)} classes confused most"
    return {
        "wrong": int((predicted != labels).sum()),
        "worst": _gallery(preprocess, result, worst, log),
        "pairs": [
            (result.classes[pair.actual], result.classes[pair.predicted], pair.photos)
            for pair in metrics.most_confused(matrix, 15)
        ],
        "confusion": charts.confusion(
            matrix[np.ix_(shown, shown)],
            [result.classes[i] for i in shown],
            f"Confusion matrix{which_classes}: actual classes down, predicted classes across",
        ),
        "which_classes": which_classes,
        "unsure": _gallery(preprocess, result, metrics.unsure(probabilities, labels, PHOTOS), log),
    }


def _most_involved(matrix: metrics.Labels) -> metrics.Labels:
    """Return the indices of the classes to show, in ascending order.

    If there are more than `CLASSES` classes, only those with the most mistakes are shown.
    """
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")
    return np.sort(order[:CLASSES])


def _gallery(
    preprocess: Preprocess, result: EvaluationResult, chosen: metrics.Labels, log: Log
) -> list[GalleryPhoto]:
    losses = metrics.losses(result.probabilities, result.labels)
    photos = []
    for index in chosen:
        row, label, path = result.probabilities[index], result.labels[index], result.paths[index]
        try:
            picture = _thumbnail(path, preprocess)
        except ImageError as error:
            log(f"skipped {path}: {error}")
            continue
        first, second = np.argsort(-row, kind="stable")[:2]
        other = second if first == label else label
        photos.append(
            GalleryPhoto(
                picture,
                path.name,
                result.classes[label],
                result.classes[first],
                row[first],
                result.classes[other],
                row[other],
                losses[index],
            )
        )
    return photos


def _thumbnail(path: Path, preprocess: Preprocess) -> str:
    """Return what the network sees of a photo, without augmentation, as a JPEG data URL."""
    as_shown = replace(preprocess, size=THUMBNAIL, interpolation="lanczos")
    photo = decode.read(path, preprocess=as_shown)
    file = io.BytesIO()
    Image.fromarray(as_shown(photo.image, photo.area)).save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
