"""Accuracy, log loss, calibration and confusions of scored rows, accumulated row by row.

The log loss uses the column `probabilities` and needs the order of the classes for it. In a table
without that column, it uses `top_k`. If the true label is a class that is not in `top_k`, its
probability is at most the smallest one listed and at most 1 minus their sum. The smaller of these
two bounds is used, so the log loss is a lower bound. If the classes are unknown, the log loss is
omitted, unless `top_k` has the true label of every row.
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
from serving.evaluation.table_reader import ParsedRow
from serving.imaging.tta import Probabilities

SMALLEST: Final = 1e-12
"""Smaller probabilities are replaced by this, so that a loss is finite. Training uses it too."""
MISTAKES: Final = 1000
"""Largest number of mistakes in memory, those with the highest probability."""
BINS: Final = 15
_EDGES: Final = [number / BINS for number in range(BINS + 1)]
_TOP: Final = 5


class ClassOrder:
    """The model's class names, in the order of the column `probabilities`.

    Attributes:
        places: Class name -> index; empty if the order is not known.
        count: Number of classes. If the names are not known, it is the length of the first
            `probabilities`, and None before that.
    """

    def __init__(self, labels: Sequence[str] | None = None, source: str = "") -> None:
        """Store the class names.

        Args:
            labels: The class names in order; None if they are not known.
            source: Where the names come from, for error messages.
        """
        self.places = {label: place for place, label in enumerate(labels or ())}
        self.count = len(labels) if labels else None
        self._source = source

    @property
    def known(self) -> bool:
        return bool(self.places)

    def check(self, row: ParsedRow, probabilities: Probabilities | None) -> None:
        """Check that a row is an answer of this model.

        Raises:
            DataError: The label or the probabilities of the row contradict the class order.
        """
        if self.count is None and probabilities is not None:
            self.count = len(probabilities)
        place, wrong = self.places.get(row.label), ""
        if self.known and place is None:
            wrong = f"the model has no label {row.label!r}"
        elif probabilities is not None and len(probabilities) != self.count:
            wrong = f"{len(probabilities)} probabilities of {self.count} classes"
        elif probabilities is not None and place is not None:
            matches = probabilities[place] == row.probability
            other = f"probabilities has another than {row.probability} for {row.label!r}"
            wrong = "" if matches else other
        if wrong:
            source = f" (class names from {self._source})" if self._source else ""
            raise DataError(
                f"{row.where}: {wrong}{source}; evaluate the rows of each model separately, "
                "with its --bundle"
            )


class StreamingMetrics:
    """Figures of the rows so far, in memory that does not grow with the number of rows.

    Attributes:
        rows: Number of rows.
        errors: Error code -> number of rows.
        errors_with_label: Number of rows with an error and a true label.
        without_label: Number of rows with an answer and no true label.
        confident: (confident, right) -> number of rows.
        confusion: (true label, predicted label) -> number of rows.
        bins: For each bin of probability: number of rows, number of right ones, sum of the
            probabilities.
        losses: True label -> sum of losses, number of rows, number of rows whose loss is only a
            lower bound.
        top: Whether the true label is among the first five (None: not known) -> number of rows.
        mistakes: Heap of (probability, -row, path, true label, predicted label).
        named: Labels in `top_k` of any row.
    """

    def __init__(self, order: ClassOrder) -> None:
        self.order = order
        self.rows = self.errors_with_label = self.without_label = 0
        self.errors, self.confident = Counter[str](), Counter[tuple[bool, bool]]()
        self.confusion = Counter[tuple[str, str]]()
        self.bins: list[list[float]] = [[0, 0, 0.0] for _ in range(BINS)]
        self.losses: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
        self.top: Counter[bool | None] = Counter()
        self.mistakes: list[tuple[float, int, str, str, str]] = []
        self.named: set[str] = set()

    def add(self, row: ParsedRow, truth: str | None) -> None:
        """Add a row; `truth` is its true label, None if that is not known.

        Raises:
            DataError: The row contradicts the class order.
        """
        self.rows += 1
        if row.code is not None:
            self.errors[row.code] += 1
            self.errors_with_label += truth is not None
            return
        probabilities, top_k = row.probabilities(), dict(row.top_k())
        self.order.check(row, probabilities)
        self.named.update(top_k)
        if truth is None:
            self.without_label += 1
            return
        right = row.label == truth
        self.confusion[truth, row.label] += 1
        if row.confident is not None:
            self.confident[row.confident, right] += 1
        place = min(max(bisect_left(_EDGES, row.probability) - 1, 0), BINS - 1)
        for index, value in enumerate((1, right, row.probability)):
            self.bins[place][index] += value
        self._add_loss(truth, top_k, probabilities)
        if not right:
            item = (row.probability, -self.rows, row.path, truth, row.label)
            heapq.heappush(self.mistakes, item)
            if len(self.mistakes) > MISTAKES:
                heapq.heappop(self.mistakes)

    def _add_loss(
        self, truth: str, top_k: dict[str, float], probabilities: Probabilities | None
    ) -> None:
        """Add the loss or its lower bound, and whether the true label is among the first five."""
        place, bound = self.order.places.get(truth), False
        first: bool | None
        if probabilities is not None and place is not None:
            own = float(probabilities[place])
            before = np.count_nonzero(probabilities > own)
            before += np.count_nonzero(probabilities[:place] == own)
            first = bool(before < _TOP)
        elif truth in top_k:
            own, first = top_k[truth], list(top_k).index(truth) < _TOP
        else:
            own, bound = min(min(top_k.values()), 1 - sum(top_k.values())), True
            not_a_class = self.order.known and place is None
            first = False if len(top_k) >= _TOP or not_a_class else None
        self.top[first] += 1
        loss = -math.log(max(own, SMALLEST))
        for index, value in enumerate((loss, 1, bound)):
            self.losses[truth][index] += value

    def figures(self) -> dict[str, Any]:
        """All figures, as JSON. Needs at least one row with an answer and a true label.

        A row whose true label the model does not have counts as a wrong answer, and is left out of
        the log loss. If the class names are not known, "unknown_labels" are the true labels that
        occur in no `top_k`.
        """
        evaluated = self.confusion.total()
        right = sum(rows for (truth, label), rows in self.confusion.items() if truth == label)
        truths = Counter[str]()
        for (truth, _), rows in self.confusion.items():
            truths[truth] += rows
        known: Container[str] = self.order.places if self.order.known else self.named
        unknown = {label: rows for label, rows in truths.most_common() if label not in known}
        with_errors = evaluated + self.errors_with_label
        return {
            "rows": self.rows,
            "answers": self.rows - self.errors.total(),
            "evaluated": evaluated,
            "errors": dict(self.errors.most_common()),
            "without_label": self.without_label,
            "unknown_labels": unknown,
            "unknown_to": "model" if self.order.known else "answers",
            "accuracy": {
                "value": right / evaluated,
                "interval": interval(right, evaluated),
                "right": right,
                "rows": evaluated,
            },
            "accuracy_errors_as_wrong": {
                "value": right / with_errors,
                "interval": interval(right, with_errors),
                "right": right,
                "rows": with_errors,
            },
            "top_5": self._top_5(evaluated),
            "log_loss": self._log_loss(unknown if self.order.known else ()),
            "calibration": self._calibration(evaluated),
            "confident": self._confident(),
            "classes": self._classes(truths),
            "confusion": [
                {"label": truth, "said": said, "rows": rows}
                for (truth, said), rows in sorted(
                    self.confusion.items(), key=lambda item: (-item[1], item[0])
                )
            ],
        }

    def _top_5(self, evaluated: int) -> float | None:
        """Top-5 accuracy; None if a row's rank is unknown or the model has at most five classes.

        If the classes are not known, the labels in `top_k` of all rows are counted instead.
        """
        if self.top[None] or 0 < (self.order.count or len(self.named)) <= _TOP:
            return None
        return self.top[True] / evaluated

    def _log_loss(self, left_out: Container[str]) -> dict[str, Any] | None:
        """None if no true label is a class, or `probabilities` can't be matched to the classes."""
        if not self.order.known and (self.order.count or any(v[2] for v in self.losses.values())):
            # `probabilities` can't be read, or a true label outside `top_k` may be no class at all.
            return None
        sums = [values for label, values in self.losses.items() if label not in left_out]
        if not sums:
            return None
        total, rows, bounds = map(sum, zip(*sums, strict=True))
        return {
            "value": total / rows,
            "at_least": bool(bounds),
            "rows": int(rows),
            "bounded_rows": int(bounds),
        }

    def _calibration(self, evaluated: int) -> dict[str, Any]:
        """Expected calibration error (Guo et al., 2017): bins of equal width, closed above."""
        return {
            "error": sum(abs(right - total) for _, right, total in self.bins) / evaluated,
            "rows": evaluated,
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
        confident = right + self.confident[True, False]
        if not rows:
            return None
        precision = right / confident if confident else None
        return {
            "coverage": confident / rows,
            "precision": precision,
            "rows": confident,
            "of": rows,
        }

    def _classes(self, truths: Counter[str]) -> list[dict[str, Any]]:
        """Accuracy of each true label, lowest first."""
        hits = {label: self.confusion[label, label] for label in truths}
        worst_first = sorted(
            truths, key=lambda label: (hits[label] / truths[label], -truths[label], label)
        )
        return [
            {
                "label": label,
                "rows": truths[label],
                "right": hits[label],
                "accuracy": hits[label] / truths[label],
            }
            for label in worst_first
        ]


def interval(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927); 95 % with the default `z`."""
    share, z2 = right / rows, z * z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    # The proportion lies within the interval; rounding could exclude it at 0 and 1.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
