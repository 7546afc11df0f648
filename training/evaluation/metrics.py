"""How good answers are: pure functions of probabilities and labels.

Throughout, probabilities are float64 [N, C] with rows that sum to 1, and labels int64 [N] in
0..C-1. N is at least 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serving.evaluation.streaming_metrics import SMALLEST as SMALLEST
from serving.evaluation.streaming_metrics import interval as interval

Probabilities = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Share of photos whose likeliest class is theirs."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def top_k(probabilities: Probabilities, labels: Labels, k: int) -> float:
    """Share of photos whose class is among the `k` likeliest; equals go to the lower index."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((order == labels[:, None]).any(axis=1).mean())


def losses(probabilities: Probabilities, labels: Labels) -> Floats:
    """Cross-entropy of each photo in nats, float64 [N]."""
    true = probabilities[np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.maximum(true, SMALLEST)))


def log_loss(probabilities: Probabilities, labels: Labels) -> float:
    """Mean cross-entropy in nats."""
    return float(losses(probabilities, labels).mean())


def confusion(predicted: Labels, labels: Labels, classes: int) -> Labels:
    """How often each class (row) was taken for each (column): int64 [C, C], summing to N."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes).astype(np.int64)


class ConfusedPair(NamedTuple):
    """A class, what it was taken for, and how many photos were."""

    actual: int
    predicted: int
    photos: int


def most_confused(matrix: Labels, at_most: int) -> list[ConfusedPair]:
    """The pairs of classes that are confused most, most first; equals in the order of classes."""
    wrong = [
        ConfusedPair(int(i), int(j), int(matrix[i, j]))
        for i, j in np.argwhere(matrix > 0)
        if i != j
    ]
    return sorted(wrong, key=lambda pair: -pair.photos)[:at_most]


class PerClass(NamedTuple):
    """Figures of each class, [C] each; NaN where one is not defined.

    precision: share of the photos said to be of the class that are.
    recall: share of the class's photos that were found.
    f1: their harmonic mean. support: photos of the class.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    support: Labels


def per_class(matrix: Labels) -> PerClass:
    """Precision, recall and F1 of each class, from a confusion matrix."""
    hits, support, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return PerClass(
        _ratio(hits, said), _ratio(hits, support), _ratio(2 * hits, support + said), support
    )


def _ratio(above: Labels, below: Labels) -> Floats:
    ratio = np.full(len(above), np.nan)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


class Calibration(NamedTuple):
    """What the likeliest class's probability is worth.

    edges: float64 [B + 1], bounds of the bins of confidence, 0 to 1.
    confidence, accuracy: float64 [B], means of each bin; NaN where it is empty.
    photos: int64 [B], how many there are in each bin.
    ece: expected calibration error, a fraction of 1: the mean over photos of the distance between
        their bin's accuracy and its confidence.
    """

    edges: Floats
    confidence: Floats
    accuracy: Floats
    photos: Labels
    ece: float


def calibration(probabilities: Probabilities, labels: Labels, bins: int = 10) -> Calibration:
    """Reliability in bins of equal width, closed above (Guo et al., 2017, "On Calibration")."""
    edges = np.linspace(0, 1, bins + 1)
    sure = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    index = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins).astype(np.int64)
    sums = np.bincount(index, weights=sure, minlength=bins)
    hits = np.bincount(index, weights=right, minlength=bins)
    confidence, share = np.full(bins, np.nan), np.full(bins, np.nan)
    np.divide(sums, count, out=confidence, where=count > 0)
    np.divide(hits, count, out=share, where=count > 0)
    ece = float(np.abs(hits - sums).sum() / len(labels))
    return Calibration(edges, confidence, share, count, ece)


def top_losses(probabilities: Probabilities, labels: Labels, at_most: int) -> Labels:
    """Indices of the photos with the largest losses, largest first."""
    return np.argsort(-losses(probabilities, labels), kind="stable")[:at_most]


def unsure(probabilities: Probabilities, labels: Labels, at_most: int) -> Labels:
    """Indices of the photos that are right with the lowest confidence, lowest first."""
    right = np.flatnonzero(probabilities.argmax(axis=1) == labels)
    order = np.argsort(probabilities[right].max(axis=1), kind="stable")
    return right[order][:at_most]
