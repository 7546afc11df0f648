"""What photos say about the accuracy that a reduced precision loses.

Held-out photos say it by their labels. Where they are too few for the accuracy budget, training
photos are used as well, without their labels: the network has learnt these, so its accuracy on them
says nothing. How often its *answer* changes does, because an answer changes when rounding moves the
logits by more than their margin, whether a photo was trained on or not. Each changed answer counts
as a lost one, which bounds the loss from above. Margins of training photos are larger; photos are
therefore weighted so that the margins are distributed as those of the held-out photos
(post-stratification). The number of photos that this evidence is worth is that of Kish, 1965,
"Survey Sampling", section 11.7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

_STRATA: Final = 10
_STRATUM: Final = 10  # held-out photos of a stratum, at least

Floats = npt.NDArray[np.float32]


class Answers(NamedTuple):
    """The answers of both graphs to N photos.

    Attributes:
        margins: Difference of the two largest logits of float32, float32 [N].
        lost: 1.0 for a photo that float32 alone classifies correctly, float32 [N].
        won: 1.0 for a photo that the other graph alone classifies correctly, float32 [N].
    """

    margins: Floats
    lost: Floats
    won: Floats

    @classmethod
    def of(cls, fp32: Floats, other: Floats, labels: npt.NDArray[np.int64] | None) -> Answers:
        """Compare logits [N, classes]. If `labels` is None, each changed answer is a lost one."""
        first, second = fp32.argmax(axis=1), other.argmax(axis=1)
        if labels is None:
            lost, won = first != second, np.zeros(len(first), bool)
        else:
            lost = (first == labels) & (second != labels)
            won = (first != labels) & (second == labels)
        top = np.sort(fp32, axis=1)[:, -2:]
        return cls((top[:, -1] - top[:, 0]), lost.astype(np.float32), won.astype(np.float32))


@dataclass(frozen=True)
class Evidence:
    """Counts for `export.precision.loss_bounds`.

    Attributes:
        held_out: Number of photos that were not trained on, those of other folds included.
        folds: Number of photos that were held out in other folds.
        training: Number of training photos.
        photos: Number of photos that they are worth together.
        lost: Number of lost answers of that many photos.
        won: Number of won answers of that many photos.
    """

    held_out: int
    training: int
    photos: float
    lost: float
    won: float
    folds: int = 0


def can_weight(held_out: int) -> bool:
    """Return whether so many held-out photos can weight training photos by their margins."""
    return held_out >= 2 * _STRATUM


def evidence(held_out: Answers, training: Answers | None = None, folds: int = 0) -> Evidence:
    """Count the answers that were lost and won.

    Args:
        held_out: Answers to photos that were not trained on, with labels.
        training: Answers to training photos, without labels. Too few held-out photos say nothing
            about margins; training photos are then not used.
        folds: Number of the held-out photos that other folds have.
    """
    count = len(held_out.lost)
    strata = min(_STRATA, count // _STRATUM)
    if training is None or not len(training.lost) or not can_weight(count):
        lost, won = float(held_out.lost.sum()), float(held_out.won.sum())
        return Evidence(count, 0, float(count), lost, won, folds)
    edges = np.quantile(held_out.margins, np.linspace(0, 1, strata + 1)[1:-1])
    both = Answers(*(np.concatenate(pair) for pair in zip(held_out, training, strict=True)))
    stratum = np.searchsorted(edges, both.margins, side="right")
    share = np.bincount(stratum[:count], minlength=strata) / count
    size = np.bincount(stratum, minlength=strata)
    used = share > 0  # equal margins may leave a stratum without held-out photos
    photos = float(1 / (share[used] ** 2 / size[used]).sum())
    weight = (share / np.maximum(size, 1))[stratum]
    lost, won = (photos * float((weight * part).sum()) for part in (both.lost, both.won))
    return Evidence(count, len(training.lost), photos, lost, won, folds)
