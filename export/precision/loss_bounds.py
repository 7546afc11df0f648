"""Confidence limits of the accuracy that a changed graph loses, and the photos they ask for.

A graph of reduced precision or of another input size classifies the same photos as the original.
Only photos on which exactly one of them is right carry information: `lost` photos that the original
alone classifies correctly, and `won` photos that the other graph alone does. The drop is
(lost - won) / photos. Its limits are those of the score test of Tango, 1998, "Equivalence test and
confidence interval for the difference in proportions for the paired-sample design", Statistics in
Medicine 17, 891-908. They stay valid for few photos, and if no answer differs.

`python -m export.precision.loss_bounds` prints the table of photos and budgets in docs/bundle.md.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from serving.terminal import show
from training.evaluation import metrics

CONFIDENCE: Final = 0.95
"""Confidence of each limit."""

_Z: Final = 1.6448536269514722  # quantile of the normal distribution for CONFIDENCE, one-sided
_BISECTIONS: Final = 60
_MAX_PHOTOS: Final = 10**7
_BUDGETS: Final = (0.25, 0.5, 1.0, 2.0, 5.0)  # points, of the table
_CHANGES: Final = (0.0, 0.1, 0.25, 0.5, 1.0)  # percent of the photos that are lost, and won


class PairedDrop(NamedTuple):
    """How far the accuracy of one graph is below that of another on the same photos.

    All numbers are percentage points; a negative drop is a gain.

    Attributes:
        drop: The drop of accuracy.
        interval: 95 % confidence interval of `drop`.
        at_most: Upper limit of the drop with 95 % confidence; see the function `at_most`.
        at_least: Lower limit of the drop with 95 % confidence.
    """

    drop: float
    interval: tuple[float, float]
    at_most: float
    at_least: float

    @classmethod
    def of(cls, lost: int, won: int, photos: int) -> PairedDrop:
        """Compute the drop and its limits from numbers of photos, as for `at_most`."""
        low, high = metrics.paired_interval(lost, won, photos)
        return cls(
            100 * (lost - won) / photos,
            (100 * low, 100 * high),
            100 * at_most(lost, won, photos),
            100 * at_least(lost, won, photos),
        )


def doubt(at_most: float, budget: float) -> str | None:
    """Return why photos can't tell whether a drop is within a budget; None if it is.

    Args:
        at_most: Upper limit of the drop with 95 % confidence, in percentage points.
        budget: Largest accepted drop, in percentage points.
    """
    if at_most <= budget:
        return None
    return (
        f"accuracy may fall by up to {at_most:.2f} points (95 % confidence), and the budget is "
        f"{budget:g}"
    )


def at_most(lost: float, won: float, photos: float) -> float:
    """Return the upper limit of the drop, from -1 to 1, as if one more answer had been wrong.

    So the limit holds whichever answer the other graph gives to any single photo.

    Args:
        lost: Number of photos that the original alone classifies correctly; of weighted photos,
            not an integer.
        won: Number of photos that the other graph alone classifies correctly.
        photos: Number of all photos, at least `lost + won`.
    """
    if photos <= 0:
        return 1.0
    one_lost = _upper(min(lost + 1.0, photos - won), won, photos)
    return max(one_lost, _upper(lost, won - 1.0, photos)) if won >= 1 else one_lost


def at_least(lost: float, won: float, photos: float) -> float:
    """Return the lower limit of the drop, as if one more answer had been right; see `at_most`."""
    return -at_most(won, lost, photos)


def least_budget(photos: float) -> float:
    """Return the upper limit of the drop if no answer differs: the least loss that can be shown."""
    return at_most(0, 0, photos)


def photos_needed(budget: float, changed: float = 0.0) -> int | None:
    """Return how many photos are needed to show that the drop is within a budget.

    Args:
        budget: Largest accepted drop, as a fraction of 1.
        changed: Fraction of the photos that are lost; the same fraction is won.

    Returns:
        The number; None if more than ten million photos would be needed, as for a budget of 0.
    """
    low, high = 0, 1
    while at_most(changed * high, changed * high, high) > budget:
        low, high = high, 2 * high
        if high > _MAX_PHOTOS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if at_most(changed * middle, changed * middle, middle) > budget:
            low = middle
        else:
            high = middle
    return high


def _upper(lost: float, won: float, photos: float) -> float:
    """Return the largest drop that the score test does not reject."""
    low, high = (lost - won) / photos, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _score(middle, lost, won, photos) > -_Z:
            low = middle
        else:
            high = middle
    return high


def _score(drop: float, lost: float, won: float, photos: float) -> float:
    """Return the score statistic for the hypothesis that the drop is `drop`."""
    linear = -lost - won + (2 * photos - lost + won) * drop
    constant = won * drop * (1 - drop)
    # The maximum-likelihood share of won photos under the hypothesis.
    root = math.sqrt(max(0.0, linear * linear + 8 * photos * constant))
    share = (root - linear) / (4 * photos)
    variance = photos * (2 * share + drop * (1 - drop))
    distance = lost - won - photos * drop
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def table() -> str:
    """Return the table of docs/bundle.md: the photos that a budget needs."""
    heads = [f"{budget:g} points" for budget in _BUDGETS]
    lines = [
        f"| answers lost, and as many won | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for changed in _CHANGES:
        counts = [photos_needed(budget / 100, changed / 100) for budget in _BUDGETS]
        cells = " | ".join(f"{count:,}" for count in counts)
        lines.append(f"| {f'{changed:g} %' if changed else 'none'} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    show(table())
