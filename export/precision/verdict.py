"""Whether a faster graph is worth what it costs, on the same photos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

BUDGET: Final = 0.5
"""Points of accuracy that a faster precision may cost."""


@dataclass(frozen=True)
class Verdict:
    """What became of a precision that was tried.

    accuracy, of_fp32: fractions of 1 on the same photos. fell: points; interval: its 95 %.
    faster: photos a second as a multiple of fp32's, each in its best setting.
    broken: photos whose logits are not finite.
    """

    photos: int
    accuracy: float
    of_fp32: float
    fell: float
    interval: tuple[float, float]
    faster: float
    budget: float
    broken: int = 0

    @property
    def refusal(self) -> str | None:
        """Why it is not kept; None where it is."""
        if self.broken:
            return f"of {self.broken} photos the logits are not finite"
        if self.fell > self.budget:
            return f"accuracy falls by {self.fell:.2f} points, and the budget is {self.budget:g}"
        if self.faster <= 1:
            return f"it is no faster here: {self.faster:.2f} times fp32"
        return None

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it under `tried`."""
        return {
            "kept": self.refusal is None,
            "why_not": self.refusal,
            "photos": self.photos,
            "accuracy": self.accuracy,
            "accuracy_fp32": self.of_fp32,
            "fell_points": round(self.fell, 3),
            "fell_interval": [round(end, 3) for end in self.interval],
            "budget_points": self.budget,
            "times_fp32": float(f"{self.faster:.3g}"),
        }

    def told(self, name: str) -> str:
        """In a line, for a person."""
        low, high = self.interval
        kept = f"refused: {self.refusal}" if self.refusal else "kept"
        return (
            f"{name} {kept}; on {self.photos} held-out photos {self.accuracy:.2%}, fp32 "
            f"{self.of_fp32:.2%} (falls by {self.fell:.2f} points, {low:.2f} to {high:.2f}), "
            f"{self.faster:.2f} times as fast"
        )


def judge(
    fp32: Sequence[int],
    other: Sequence[int],
    labels: Sequence[int],
    *,
    faster: float,
    budget: float = BUDGET,
) -> Verdict:
    """Compare best classes of the same photos.

    Args:
        fp32, other: Best class of each photo, by each graph.
        labels: Of each photo; at least one.
        faster: As in `Verdict`.
        budget: Points that may be lost.
    """
    truth = np.asarray(labels)
    was, now = np.asarray(fp32) == truth, np.asarray(other) == truth
    lost, won = int((was & ~now).sum()), int((now & ~was).sum())
    return Verdict(
        photos=len(truth),
        accuracy=float(now.mean()),
        of_fp32=float(was.mean()),
        fell=100 * (lost - won) / len(truth),
        interval=_paired_interval(lost, won, len(truth)),
        faster=faster,
        budget=budget,
    )


def _paired_interval(lost: int, won: int, photos: int) -> tuple[float, float]:
    """95 % interval of the fall in points, photos being paired.

    Agresti & Min, 2005, "Simple improved confidence intervals for comparing matched proportions":
    half a photo is added to each cell, so that it has a width where nothing changed.
    """
    count = photos + 2
    middle = (lost - won) / count
    variance = (lost + won + 1 - (lost - won) ** 2 / count) / count**2
    half = 1.959964 * math.sqrt(variance)
    return 100 * (middle - half), 100 * (middle + half)
