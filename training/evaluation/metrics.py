"""Compute classification metrics from probabilities and labels.

In all functions, probabilities are float64 [N, C] with rows that sum to 1, and labels int64 [N] in
0..C-1. N is at least 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serving.evaluation.streaming_metrics import SMALLEST as SMALLEST
from serving.evaluation.streaming_metrics import interval as interval

Probabilities = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Return the share of photos whose most probable class is the label."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def top_k(probabilities: Probabilities, labels: Labels, k: int) -> float:
    """Return the share of photos whose label is among the `k` most probable classes.

    Of classes with equal probability, those with smaller indices come first.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((order == labels[:, None]).any(axis=1).mean())


def losses(probabilities: Probabilities, labels: Labels) -> Floats:
    """Return the cross-entropy of each photo in nats, float64 [N]."""
    true = probabilities[np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.maximum(true, SMALLEST)))


def log_loss(probabilities: Probabilities, labels: Labels) -> float:
    """Return the mean cross-entropy in nats."""
    return float(losses(probabilities, labels).mean())


def confusion(predicted: Labels, labels: Labels, classes: int) -> Labels:
    """Return the confusion matrix, int64 [C, C]: a row per label, a column per predicted class."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes).astype(np.int64)


class ConfusedPair(NamedTuple):
    """Number of photos of class `actual` that were predicted as class `predicted`."""

    actual: int
    predicted: int
    photos: int


def most_confused(matrix: Labels, at_most: int) -> list[ConfusedPair]:
    """Return the pairs of classes that are confused most often, in descending order.

    Pairs with equal numbers of photos are in the order of their classes.
    """
    wrong = [
        ConfusedPair(int(i), int(j), int(matrix[i, j]))
        for i, j in np.argwhere(matrix > 0)
        if i != j
    ]
    return sorted(wrong, key=lambda pair: -pair.photos)[:at_most]


class PerClass(NamedTuple):
    """Metrics of each class, one array [C] per metric; NaN where undefined (0 / 0).

    Attributes:
        precision: Of the photos predicted as the class, the share that belongs to the class.
        recall: Of the photos that belong to the class, the share predicted as the class.
        f1: Harmonic mean of precision and recall.
        support: Number of photos of the class.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    support: Labels


def per_class(matrix: Labels) -> PerClass:
    """Compute precision, recall and F1 of each class from a confusion matrix."""
    hits, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return PerClass(
        _ratio(hits, predicted),
        _ratio(hits, support),
        _ratio(2 * hits, support + predicted),
        support,
    )


def _ratio(above: Labels, below: Labels) -> Floats:
    ratio = np.full(len(above), np.nan)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


class Calibration(NamedTuple):
    """Accuracy by confidence, in B bins; confidence is the probability of the predicted class.

    Attributes:
        edges: Bounds of the bins from 0 to 1, float64 [B + 1].
        confidence: Mean confidence of each bin, float64 [B]; NaN if the bin is empty.
        accuracy: Accuracy of each bin, float64 [B]; NaN if the bin is empty.
        photos: Number of photos in each bin, int64 [B].
        ece: Expected calibration error from 0 to 1: the difference between accuracy and mean
            confidence of a bin, averaged over all photos.
    """

    edges: Floats
    confidence: Floats
    accuracy: Floats
    photos: Labels
    ece: float


def calibration(probabilities: Probabilities, labels: Labels, bins: int = 10) -> Calibration:
    """Compare accuracy with confidence in bins of equal width (Guo et al., 2017).

    A bin includes its upper bound, but not its lower bound.
    """
    edges = np.linspace(0, 1, bins + 1)
    confidences = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    index = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins).astype(np.int64)
    sums = np.bincount(index, weights=confidences, minlength=bins)
    hits = np.bincount(index, weights=right, minlength=bins)
    confidence, share = np.full(bins, np.nan), np.full(bins, np.nan)
    np.divide(sums, count, out=confidence, where=count > 0)
    np.divide(hits, count, out=share, where=count > 0)
    ece = float(np.abs(hits - sums).sum() / len(labels))
    return Calibration(edges, confidence, share, count, ece)


def paired_interval(lost: int, won: int, photos: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a drop in accuracy on the same photos, from -1 to 1.

    The method is that of Agresti & Min, 2005, "Simple improved confidence intervals for comparing
    matched proportions": half a photo is added to each cell of the 2 x 2 table of right and wrong
    answers. The interval therefore has a positive width even if no prediction changed.

    Args:
        lost: Number of photos that only the first of two predictors classifies correctly.
        won: Number of photos that only the second classifies correctly.
        photos: Number of all photos.
    """
    count = photos + 2
    middle = (lost - won) / count
    variance = (lost + won + 1 - (lost - won) ** 2 / count) / count**2
    half = 1.959964 * math.sqrt(variance)
    return middle - half, middle + half


def top_losses(probabilities: Probabilities, labels: Labels, at_most: int) -> Labels:
    """Return indices of the photos with the largest losses, largest first."""
    return np.argsort(-losses(probabilities, labels), kind="stable")[:at_most]


def unsure(probabilities: Probabilities, labels: Labels, at_most: int) -> Labels:
    """Return indices of the correctly classified photos with the lowest confidence.

    The photo with the lowest confidence comes first.
    """
    right = np.flatnonzero(probabilities.argmax(axis=1) == labels)
    order = np.argsort(probabilities[right].max(axis=1), kind="stable")
    return right[order][:at_most]
