"""Means of a few runs, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and half the width of its 95 % confidence interval; nan where one can't be had."""

    mean: float
    half: float
    runs: int


def interval(values: Sequence[float], overlap: float = 0.0) -> Interval:
    """The mean of values with Student's t interval ("Student", 1908).

    overlap: held-out photos for each photo trained on, where the values are those of folds: their
    training sets share photos, so they are not independent and the variance of their mean is
    larger (Nadeau & Bengio, 2003, "Inference for the Generalization Error", 3). 0 for seeds.
    """
    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, n)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, t_quantile(0.975, n - 1) * math.sqrt(variance * (1 / n + overlap)), n)


def difference(
    values: Mapping[str, float], others: Mapping[str, float], overlap: float = 0.0
) -> Interval:
    """Of values less others, pair by pair of the same key; keys of one side alone don't count.

    Runs of one seed or fold share their photos and the order of them: the difference of a pair is
    far surer than the difference of two means.
    """
    return interval([values[key] - others[key] for key in values if key in others], overlap)


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t below which `probability` lies, from 0.5 to 0.9999, `freedom` at least 1."""
    low, high = 0.0, 1e5
    for _ in range(100):
        middle = (low + high) / 2
        if (1 + _central(middle, freedom)) / 2 < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central(t: float, freedom: int) -> float:
    """The probability of [-t, t] (Abramowitz & Stegun, 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
