"""Scored rows against their true labels, counted one by one, and the figures that follow.

A true label that is not in a row's `top_k` has at most the least of the probabilities there, and at
most what they leave of 1. So without the column `probabilities` a log loss may be a lower bound.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from typing import Any, Final

import numpy as np

from serving.errors import DataError
from serving.evaluation.score_table import ParsedRow
from serving.imaging.tta import Probabilities

SMALLEST: Final = 1e-12
"""Probabilities below count as this, so that a loss is finite; in training, too."""
MISTAKES: Final = 1000
BINS: Final = 15
_EDGES: Final = [number / BINS for number in range(BINS + 1)]
_TOP: Final = 5
_WHOLE: Final = 1 - 1e-9


class ClassOrder:
    """Which label has which of the column `probabilities`.

    From the bundle; else learnt from `top_k`, whose probabilities are found again among them.
    """

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        """`labels`: the bundle's, where there is one."""
        self.places = {label: place for place, label in enumerate(labels or ())}
        self.classes = len(labels) if labels else None

    @property
    def complete(self) -> bool:
        """Whether all labels are known."""
        return len(self.places) == self.classes

    def learn(self, answer: ParsedRow) -> None:
        """Take one row's evidence, before the first is judged."""
        every = None if answer.code or self.complete else answer.probabilities()
        if every is None:
            return
        self.classes = self.classes or len(every)
        self.check(answer, every)
        for label, probability in answer.top_k():
            if label not in self.places:
                found = np.flatnonzero(every == probability)
                if len(found) == 1:  # where several are equal, another row may tell
                    self.places[label] = int(found[0])

    def check(self, answer: ParsedRow, every: Probabilities | None) -> None:
        """Refuse an answer of another model.

        Raises:
            DataError: Its label or its probabilities are none of this one's.
        """
        place, wrong = self.places.get(answer.label), ""
        if self.complete and place is None:
            wrong = f"the model has no label {answer.label!r}"
        elif every is not None and len(every) != self.classes:
            wrong = f"{len(every)} probabilities of {self.classes} classes"
        elif every is not None and place is not None and every[place] != answer.probability:
            wrong = f"probabilities has another than {answer.probability} for {answer.label!r}"
        if wrong:
            raise DataError(f"{answer.where}: {wrong}; evaluate the rows of each model alone")

    def at_most(self, every: Probabilities) -> float:
        """The largest probability that a label which is not known can have."""
        return float(np.delete(every, list(self.places.values())).max(initial=0))


class StreamingMetrics:
    """Figures of the rows so far; its size does not grow with their number."""

    def __init__(self, order: ClassOrder) -> None:
        """Nothing yet."""
        self.order = order
        self.rows = self.errors_with_label = self.without_label = 0
        self.errors, self.confident = Counter[str](), Counter[tuple[bool, bool]]()
        self.confusion = Counter[tuple[str, str]]()
        # of each bin of probability: rows, right ones, sum of probabilities
        self.bins: list[list[float]] = [[0, 0, 0.0] for _ in range(BINS)]
        # of each true label: sum, rows, those of which only a bound is known
        self.losses: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
        self.top: Counter[bool | None] = Counter()
        self.mistakes: list[tuple[float, int, str, str, str]] = []
        self.named: set[str] = set()
        self._listed: set[str] | None = None  # the labels of every top_k, while they are the same

    def add(self, answer: ParsedRow, truth: str | None) -> None:
        """One more row; `truth` is its true label, where it is known."""
        self.rows += 1
        if answer.code is not None:
            self.errors[answer.code] += 1
            self.errors_with_label += truth is not None
            return
        every, top_k = answer.probabilities(), dict(answer.top_k())
        self.order.check(answer, every)
        self._name(top_k)
        if truth is None:
            self.without_label += 1
            return
        right = answer.label == truth
        self.confusion[truth, answer.label] += 1
        if answer.confident is not None:
            self.confident[answer.confident, right] += 1
        place = min(max(bisect_left(_EDGES, answer.probability) - 1, 0), BINS - 1)
        for index, value in enumerate((1, right, answer.probability)):
            self.bins[place][index] += value
        self._lose(truth, top_k, every)
        if not right:
            item = (answer.probability, -self.rows, answer.path, truth, answer.label)
            heapq.heappush(self.mistakes, item)
            if len(self.mistakes) > MISTAKES:
                heapq.heappop(self.mistakes)

    @property
    def labels(self) -> set[str] | None:
        """All labels of the model; None where the table does not tell."""
        return set(self.order.places) if self.order.complete else self._listed or None

    def _name(self, top_k: dict[str, float]) -> None:
        """Learn the model's labels: all, if every row lists the same ones and they sum to 1."""
        self.named.update(top_k)
        whole = sum(top_k.values()) > _WHOLE
        if self._listed is None:
            self._listed = set(top_k) if whole else set()
        elif not whole or self._listed != top_k.keys():
            self._listed = set()

    def _lose(self, truth: str, top_k: dict[str, float], every: Probabilities | None) -> None:
        """Add the loss, or the least that it can be; and whether the label is among the first."""
        place, bound = self.order.places.get(truth), False
        first: bool | None
        if every is not None and place is not None:
            own = float(every[place])
            before = np.count_nonzero(every > own) + np.count_nonzero(every[:place] == own)
            first = bool(before < _TOP)
        elif truth in top_k:
            own, first = top_k[truth], list(top_k).index(truth) < _TOP
        else:
            own, bound = min(min(top_k.values()), 1 - sum(top_k.values())), True
            own = own if every is None else min(own, self.order.at_most(every))
            first = False if len(top_k) >= _TOP or self.order.complete else None
        self.top[first] += 1
        loss = -math.log(max(own, SMALLEST))
        for index, value in enumerate((loss, 1, bound)):
            self.losses[truth][index] += value

    def figures(self) -> dict[str, Any]:
        """All that is known, as JSON. Needs a row that has an answer and a true label."""
        photos = self.confusion.total()
        right = sum(rows for (truth, said), rows in self.confusion.items() if truth == said)
        truths, has = Counter[str](), self.labels
        for (truth, _), rows in self.confusion.items():
            truths[truth] += rows
        known = self.named if has is None else has
        unknown = {label: rows for label, rows in truths.most_common() if label not in known}
        with_errors = photos + self.errors_with_label
        return {
            "rows": self.rows,
            "answers": self.rows - self.errors.total(),
            "evaluated": photos,
            "errors": dict(self.errors.most_common()),
            "without_label": self.without_label,
            "unknown_labels": unknown,
            "unknown_to": "answers" if has is None else "model",
            "accuracy": {
                "value": right / photos,
                "interval": interval(right, photos),
                "right": right,
                "rows": photos,
            },
            "accuracy_errors_as_wrong": {
                "value": right / with_errors,
                "interval": interval(right, with_errors),
                "right": right,
                "rows": with_errors,
            },
            "top_5": self._top_5(photos),
            "log_loss": self._log_loss(unknown if has is not None else ()),
            "calibration": self._calibration(photos),
            "confident": self._confident(),
            "classes": self._classes(truths),
            "confusion": [
                {"label": truth, "said": said, "rows": rows}
                for (truth, said), rows in sorted(
                    self.confusion.items(), key=lambda item: (-item[1], item[0])
                )
            ],
        }

    def _top_5(self, photos: int) -> float | None:
        """None where the rows don't tell, or the model has no more labels."""
        classes = self.order.classes or len(self.labels or ())
        if self.top[None] or 0 < classes <= _TOP:
            return None
        return self.top[True] / photos

    def _log_loss(self, without: Container[str]) -> dict[str, Any] | None:
        kept = [sums for label, sums in self.losses.items() if label not in without]
        if not kept:
            return None
        total, rows, bounds = map(sum, zip(*kept, strict=True))
        return {
            "value": total / rows,
            "at_least": bool(bounds),
            "rows": int(rows),
            "bounded_rows": int(bounds),
        }

    def _calibration(self, photos: int) -> dict[str, Any]:
        """Expected calibration error (Guo et al., 2017): bins of equal width, closed above."""
        return {
            "error": sum(abs(right - total) for _, right, total in self.bins) / photos,
            "rows": photos,
            "bins": [
                {
                    "above": low,
                    "rows": int(rows),
                    "accuracy": right / rows if rows else None,
                    "probability": total / rows if rows else None,
                }
                for low, (rows, right, total) in zip(_EDGES, self.bins, strict=False)
            ],
        }

    def _confident(self) -> dict[str, Any] | None:
        rows, right = self.confident.total(), self.confident[True, True]
        sure = right + self.confident[True, False]
        if not rows:
            return None
        precision = right / sure if sure else None
        return {"coverage": sure / rows, "precision": precision, "rows": sure, "of": rows}

    def _classes(self, truths: Counter[str]) -> list[dict[str, Any]]:
        """Each true label, worst first."""
        hits = {label: self.confusion[label, label] for label in truths}
        worst = sorted(
            truths, key=lambda label: (hits[label] / truths[label], -truths[label], label)
        )
        return [
            {
                "label": label,
                "rows": truths[label],
                "right": hits[label],
                "accuracy": hits[label] / truths[label],
            }
            for label in worst
        ]


def interval(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, of 95 % unless `z` says otherwise (Wilson, 1927)."""
    share, z2 = right / rows, z * z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    # The share is always inside; rounding may say otherwise at 0 and 1.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
