"""Decide whether to keep a reduced-precision graph, by accuracy and speed compared with fp32.

It is kept if it is certain enough (95 %) that accuracy falls by no more than the budget. It is
refused if it is as certain that accuracy falls by more. Between the two the photos can't tell, and
fp32 is served. No single photo can turn one decision into the other: see `loss_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from export.precision import loss_bounds
from export.precision.evidence import Answers, Evidence

DEFAULT_BUDGET: Final = 0.5
"""Percentage points of accuracy that a faster precision may cost."""

_MOST_ADVISED: Final = 5.0
"""Largest budget that a message tells; a larger one is no budget, but a want of photos."""


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
        budget: Largest accepted loss of accuracy, in percentage points.
        at_most: Upper limit of the drop with 95 % confidence, in percentage points, by `evidence`;
            see `loss_bounds.at_most`.
        at_least: Lower limit of the drop with 95 % confidence, in percentage points, by the
            held-out photos.
        evidence: The photos that `at_most` is based on. None: the held-out photos.
        insisted: Whether the precision was requested by name. It is kept then, unless it is certain
            that accuracy falls by more than the budget.
        not_finite: Number of photos with logits that are not finite.
    """

    photos: int
    accuracy: float
    accuracy_fp32: float
    drop: float
    interval: tuple[float, float]
    speedup: float
    budget: float
    at_most: float
    at_least: float
    evidence: Evidence | None = None
    insisted: bool = False
    not_finite: int = 0

    @property
    def worth(self) -> float:
        """Number of photos that the evidence is worth."""
        return self.evidence.photos if self.evidence else self.photos

    @property
    def kept(self) -> bool:
        """Whether the reduced-precision graph is kept in the bundle."""
        return self.refusal_reason is None

    @property
    def refusal_reason(self) -> str | None:
        """The reason for leaving the graph out of the bundle; None if it is kept."""
        if self.not_finite:
            return f"the logits of {self.not_finite} photos are not finite"
        if self.at_least > self.budget:
            return f"accuracy falls by {self.drop:.2f} points, and the budget is {self.budget:g}"
        if self.speedup <= 1:
            return f"it is no faster here: {self.speedup:.2f} times fp32"
        return None if self.insisted else self.doubt

    @property
    def doubt(self) -> str | None:
        """Why the photos can't tell whether the drop is within the budget; None if it is."""
        return loss_bounds.doubt(self.at_most, self.budget)

    @property
    def is_unsure(self) -> bool:
        """Whether the graph is left out for want of photos alone."""
        return self.refusal_reason is not None and self.refusal_reason == self.doubt

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
            "fell_at_most": round(self.at_most, 3),
            "fell_at_least": round(self.at_least, 3),
            "confidence": loss_bounds.CONFIDENCE,
            "photos_by": {
                "held_out": self.evidence.held_out if self.evidence else self.photos,
                "folds": self.evidence.folds if self.evidence else 0,
                "training": self.evidence.training if self.evidence else 0,
                "worth": round(self.worth),
            },
            "least_budget_points": round(100 * loss_bounds.least_budget(self.worth), 3),
            "sure": self.doubt is None or self.at_least > self.budget,
            "budget_points": self.budget,
            "times_fp32": float(f"{self.speedup:.3g}"),
        }

    def summary(self, name: str, *, has_run: bool = True) -> str:
        """Describe the verdict on the precision `name` in one line; see `remedy`."""
        reason, more = self.refusal_reason, ""
        result = "kept" if self.kept else f"refused: {reason}"
        if self.is_unsure:
            weighted = bool(self.evidence and self.evidence.training)
            hint = remedy(
                name, self.budget, self.worth, self.at_most, weighted=weighted, has_run=has_run
            )
            result = f"not kept: {reason}; {hint}"
        elif self.kept and self.doubt:
            result = f"kept, as --precision {name} asks, though {self.doubt}"
        of_folds = self.evidence.folds if self.evidence else 0
        folds = f", {of_folds} of them of other folds" if of_folds else ""
        if self.evidence and self.evidence.training:
            more = f" by these and {self.evidence.training} training photos"
        return (
            f"{name} {result}; on {self.photos} held-out photos{folds} {self.accuracy:.2%}, fp32 "
            f"{self.accuracy_fp32:.2%} (falls by {self.drop:.2f} points; at most "
            f"{self.at_most:.2f} with 95 % confidence{more}), {self.speedup:.2f} times as fast"
        )


def remedy(
    name: str,
    budget: float,
    photos: float,
    shown: float | None = None,
    *,
    weighted: bool = False,
    has_run: bool = True,
) -> str:
    """Say what a number of photos can show at best, how many are needed, and what else helps.

    Args:
        name: Name of the precision.
        budget: Largest accepted loss of accuracy, in percentage points.
        photos: The number of photos.
        shown: The loss that they show; None: the least that they could show.
        weighted: Whether there are more photos, and this is what they are worth.
        has_run: Whether a run is exported, which other folds may have, and not a checkpoint.
    """
    least = 100 * loss_bounds.least_budget(photos)
    needed = loss_bounds.photos_needed(budget / 100)
    more = f"{needed:,} or more are needed" if needed else "no number of photos is enough"
    enough = math.ceil(100 * (least if shown is None else shown)) / 100
    can = f"{photos:,.0f} photos can show"
    if weighted:
        can = f"all photos together are worth {photos:,.0f}, which can show"
    add = (
        "held-out photos with --photos DIR or --folds RUN" if has_run else "photos to --photos DIR"
    )
    use = f"use --accuracy-budget {enough:g}, or" if enough <= _MOST_ADVISED else "or use"
    return (
        f"{can} at best that it falls by no more than {least:.2f} points, and {more} for "
        f"{budget:g}; add {add}, {use} --precision {name} to keep it nevertheless"
    )


def compare_with_fp32(
    fp32: Sequence[int],
    other: Sequence[int],
    labels: Sequence[int],
    *,
    speedup: float,
    budget: float = DEFAULT_BUDGET,
    evidence: Evidence | None = None,
    insisted: bool = False,
) -> Verdict:
    """Compare the predicted classes of a reduced-precision graph and the fp32 graph.

    Args:
        fp32: Class that the fp32 graph predicts for each photo.
        other: Class that the reduced-precision graph predicts for each photo.
        labels: True class of each photo; at least one photo.
        speedup: Photos per second of the reduced-precision graph divided by those of fp32.
        budget: Largest accepted loss of accuracy, in percentage points.
        evidence: These photos and training photos. None: these photos.
        insisted: Whether the precision was requested by name.
    """
    truth = np.asarray(labels)
    right_fp32, right = np.asarray(fp32) == truth, np.asarray(other) == truth
    lost, won = int((right_fp32 & ~right).sum()), int((right & ~right_fp32).sum())
    counts: tuple[float, float, float] = (lost, won, len(truth))
    if evidence is not None:
        counts = evidence.lost, evidence.won, evidence.photos
    paired = loss_bounds.PairedDrop.of(lost, won, len(truth))
    return Verdict(
        photos=len(truth),
        accuracy=float(right.mean()),
        accuracy_fp32=float(right_fp32.mean()),
        drop=paired.drop,
        interval=paired.interval,
        speedup=speedup,
        budget=budget,
        at_most=100 * loss_bounds.at_most(*counts),
        at_least=paired.at_least,
        evidence=evidence,
        insisted=insisted,
    )


def decide(
    judge: Callable[[Answers | None], Verdict], training: Callable[[], Answers | None]
) -> Verdict:
    """Return the verdict by the held-out photos, or with training photos if these show less loss.

    What the held-out photos show is never dropped, so a larger budget keeps all that a smaller one
    keeps.

    Args:
        judge: Function of answers to training photos, or of None, that returns the verdict.
        training: Function that returns answers to training photos, or None if there are none. It is
            called if the held-out photos leave a doubt.
    """
    verdict = judge(None)
    answers = training() if verdict.doubt else None
    if answers is None:
        return verdict
    return min(judge(answers), verdict, key=lambda one: one.at_most)
