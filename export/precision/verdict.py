"""Decide whether to keep a reduced-precision graph, by accuracy and speed compared with fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

DEFAULT_BUDGET: Final = 0.5
"""Percentage points of accuracy that a faster precision may cost."""


@dataclass(frozen=True)
class Verdict:
    """The comparison of a reduced-precision graph with the fp32 graph.

    Attributes:
        photos: Number of held-out photos.
        accuracy: Accuracy of the reduced-precision graph, from 0 to 1.
        accuracy_fp32: Accuracy of the fp32 graph on the same photos, from 0 to 1.
        drop: `accuracy_fp32` minus `accuracy`, in percentage points.
        interval: 95 % confidence interval of `drop`, in percentage points.
        speedup: Photos per second divided by those of fp32, each graph in its fastest setting.
        budget: Largest accepted `drop`.
        not_finite: Number of photos with logits that are not finite.
    """

    photos: int
    accuracy: float
    accuracy_fp32: float
    drop: float
    interval: tuple[float, float]
    speedup: float
    budget: float
    not_finite: int = 0

    @property
    def kept(self) -> bool:
        """Whether the reduced-precision graph is kept in the bundle."""
        return self.refusal_reason is None

    @property
    def refusal_reason(self) -> str | None:
        """The reason for leaving the graph out of the bundle; None if it is kept."""
        if self.not_finite:
            return f"the logits of {self.not_finite} photos are not finite"
        if self.drop > self.budget:
            return f"accuracy falls by {self.drop:.2f} points, and the budget is {self.budget:g}"
        if self.speedup <= 1:
            return f"it is no faster here: {self.speedup:.2f} times fp32"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the precision's entry for the manifest's dict `tried`."""
        return {
            "kept": self.kept,
            "why_not": self.refusal_reason,
            "photos": self.photos,
            "accuracy": self.accuracy,
            "accuracy_fp32": self.accuracy_fp32,
            "fell_points": round(self.drop, 3),
            "fell_interval": [round(end, 3) for end in self.interval],
            "budget_points": self.budget,
            "times_fp32": float(f"{self.speedup:.3g}"),
        }

    def summary(self, name: str) -> str:
        """Describe the verdict on the precision `name` in one line."""
        low, high = self.interval
        result = "kept" if self.kept else f"refused: {self.refusal_reason}"
        return (
            f"{name} {result}; on {self.photos} held-out photos {self.accuracy:.2%}, fp32 "
            f"{self.accuracy_fp32:.2%} (falls by {self.drop:.2f} points, {low:.2f} to {high:.2f}), "
            f"{self.speedup:.2f} times as fast"
        )


def compare_with_fp32(
    fp32: Sequence[int],
    other: Sequence[int],
    labels: Sequence[int],
    *,
    speedup: float,
    budget: float = DEFAULT_BUDGET,
) -> Verdict:
    """Compare the predicted classes of a reduced-precision graph and the fp32 graph.

    Args:
        fp32: Class that the fp32 graph predicts for each photo.
        other: Class that the reduced-precision graph predicts for each photo.
        labels: True class of each photo; at least one photo.
        speedup: Photos per second of the reduced-precision graph divided by those of fp32.
        budget: Largest accepted loss of accuracy, in percentage points.
    """
    truth = np.asarray(labels)
    right_fp32, right = np.asarray(fp32) == truth, np.asarray(other) == truth
    lost, won = int((right_fp32 & ~right).sum()), int((right & ~right_fp32).sum())
    return Verdict(
        photos=len(truth),
        accuracy=float(right.mean()),
        accuracy_fp32=float(right_fp32.mean()),
        drop=100 * (lost - won) / len(truth),
        interval=_paired_interval(lost, won, len(truth)),
        speedup=speedup,
        budget=budget,
    )


def _paired_interval(lost: int, won: int, photos: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the accuracy drop, in percentage points.

    The method is that of Agresti & Min, 2005, "Simple improved confidence intervals for comparing
    matched proportions": half a photo is added to each cell of the 2 x 2 table of right and wrong
    answers. The interval therefore has a positive width even if no prediction changed.
    """
    count = photos + 2
    middle = (lost - won) / count
    variance = (lost + won + 1 - (lost - won) ** 2 / count) / count**2
    half = 1.959964 * math.sqrt(variance)
    return 100 * (middle - half), 100 * (middle + half)
