"""Say where an accuracy is worth less than it looks: one class always said, or classes never found.

All functions take the photos and the right answers of each class, int64 [C], on the same photos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from training.evaluation import metrics
from training.evaluation.metrics import Labels, Probabilities

_SHOWN: Final = 5
"""Largest number of classes that a line names."""


def count(probabilities: Probabilities, labels: Labels) -> tuple[Labels, Labels]:
    """Return the number of photos and of right answers of each class.

    Args:
        probabilities: float64 [N, C].
        labels: True classes, int64 [N].
    """
    classes = probabilities.shape[1]
    matrix = metrics.confusion(probabilities.argmax(axis=1), labels, classes)
    return matrix.sum(axis=1), np.diag(matrix).copy()


def balanced_accuracy(photos: Labels, right: Labels) -> float:
    """Return the mean recall of the classes that have photos: each class counts the same.

    Source: Brodersen et al., 2010, "The Balanced Accuracy and Its Posterior Distribution".
    """
    return float((right[photos > 0] / photos[photos > 0]).mean())


def shortcomings(classes: Sequence[str], photos: Labels, right: Labels) -> Iterator[str]:
    """Yield a line if the accuracy is hardly that of one constant answer, and if classes are lost.

    The accuracy is at the level of always giving the most common class if it is at most one
    standard error of that level above it.

    Args:
        classes: Names of the classes.
        photos: Number of photos of each class.
        right: Number of right answers of each class.
    """
    total, most = int(photos.sum()), int(photos.max())
    if (photos > 0).sum() < 2:
        return
    accuracy, constant = int(right.sum()) / total, most / total
    if accuracy <= constant + math.sqrt(constant * (1 - constant) / total):
        where = "below" if accuracy < constant else "at"
        yield (
            f"accuracy {accuracy:.2%} is {where} the level of always saying "
            f"{classes[int(photos.argmax())]}, {constant:.2%} of {total:,} photos; "
            f"balanced over the classes it is {balanced_accuracy(photos, right):.2%}"
        )
    lost = [i for i in range(len(classes)) if photos[i] and not right[i]]
    if lost:
        named = [f"{classes[i]} (0 of {photos[i]:,})" for i in lost[:_SHOWN]]
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        count = "1 class is" if len(lost) == 1 else f"{len(lost)} classes are"
        yield f"{count} never found: {', '.join(named)}{more}"


def unmeasured(classes: Sequence[str], photos: Labels) -> Iterator[str]:
    """Yield a line if classes have no photo, so that the accuracy says nothing about them.

    Args:
        classes: Names of the classes.
        photos: Number of photos of each class.
    """
    missing = [name for name, number in zip(classes, photos, strict=True) if not number]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        several = len(missing) > 1
        count = f"{len(missing)} classes have" if several else "1 class has"
        yield (
            f"{count} no photo among those that the accuracy was measured on: "
            f"{', '.join(missing[:_SHOWN])}{more}; it says nothing about "
            f"{'them' if several else 'it'}"
        )


REMEDY: Final = (
    "look at the photos as training sees them with `fledge preview {data} --augment`, correct "
    "wrong labels, add photos of the weak classes, or train longer: {longer}"
)
"""What to do about shortcomings; `data` is the quoted value of `--data`, `longer` an override."""
