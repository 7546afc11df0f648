"""Accuracy, log loss, calibration and confusion counts of scored images, accumulated row by row.

The log loss of a table row is computed from the column `probabilities` (all classes) if the table
has it, and otherwise from `top_k` (the most probable classes). `probabilities` can only be read if
the order of the model's classes is known.

If the true label is not in `top_k`, only an upper bound of its probability is known: the smaller of
the lowest probability in `top_k` and 1 minus the sum of `top_k`. The log loss is then a lower
bound.

If the class names are unknown, the log loss is only computed if the table has no column
`probabilities` and `top_k` contains the true label of every row.
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
"""Lower bound of a probability in the log loss, which keeps the loss finite. Same in training."""
MISTAKES: Final = 1000
"""Number of wrong answers kept in memory. Those with the highest probability are kept."""
BINS: Final = 15
_EDGES: Final = [number / BINS for number in range(BINS + 1)]
_TOP: Final = 5


class ClassOrder:
    """Class names of the model, in the order of the column `probabilities`.

    Attributes:
        places: Maps each class name to its index in `probabilities`; empty if the order is unknown.
        count: Number of classes. If the names are unknown: None until a row with `probabilities` is
            checked, and then the number of probabilities in that row.
    """

    def __init__(self, labels: Sequence[str] | None = None, source: str = "") -> None:
        """Store the class names.

        Args:
            labels: Class names in order; None if they are unknown.
            source: Where the names were read from, for error messages.
        """
        self.places = {label: place for place, label in enumerate(labels or ())}
        self.count = len(labels) if labels else None
        self._source = source

    @property
    def known(self) -> bool:
        return bool(self.places)

    def check(self, row: ParsedRow, probabilities: Probabilities | None) -> None:
        """Check that a table row can be a prediction of this model.

        Args:
            row: A row without an error.
            probabilities: Parsed column `probabilities`, float64 [C]; None if the table lacks it.

        Raises:
            DataError: The label is not a class of the model, the number of probabilities differs
                from the number of classes, or the probability at the label's index differs from
                `row.probability`.
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
    """Counts and sums of the table rows added so far.

    Memory does not grow with the number of rows. An answer is a row without an error.

    Attributes:
        order: The model's class names.
        rows: Number of table rows.
        errors: For each error code, the number of rows.
        errors_with_label: Number of rows that have an error and a true label.
        without_label: Number of answers without a true label.
        confident: Number of answers for each pair of booleans (confident, correct).
        confusion: Number of answers for each pair (true label, predicted label).
        bins: For each of the `BINS` intervals of predicted probability, the number of answers, the
            number of correct ones, and the sum of predicted probabilities.
        losses: For each true label, the sum of losses, the number of answers, and the number of
            answers whose loss is only a lower bound.
        top: Number of answers whose true label is among the five most probable classes (key True),
            is not (False), or for which this is unknown (None).
        mistakes: Heap of the wrong answers with the highest probability, as tuples (probability,
            -number of the row, path, true label, predicted label).
        named: All labels that occur in the column `top_k` of any row.
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
        """Add a table row.

        Args:
            row: The row.
            truth: True label of the image; None if it is unknown.

        Raises:
            DataError: The row can't be a prediction of this model (see `ClassOrder.check`), or its
                probabilities can't be parsed.
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
        """Add the loss of one answer, and count whether the true label is in the top five.

        Args:
            truth: True label.
            top_k: Probabilities of the most probable classes, by label.
            probabilities: Probabilities of all classes, float64 [C]; None if the table lacks them.
        """
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
        """Return all figures in the form of the JSON output.

        At least one added row must have an answer and a true label. If a true label is not a class
        of the model, the answer counts as wrong and is left out of the log loss.

        "unknown_labels" lists the true labels that are not classes of the model. If the class names
        are unknown, it lists the true labels that are not in the column `top_k` of any row.
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
        """Return the share of answers whose true label is among the five most probable classes.

        None if this is unknown for any answer, or if the model has at most five classes. If the
        number of classes is unknown, the number of distinct labels in the column `top_k` of all
        rows is used instead.
        """
        if self.top[None] or 0 < (self.order.count or len(self.named)) <= _TOP:
            return None
        return self.top[True] / evaluated

    def _log_loss(self, left_out: Container[str]) -> dict[str, Any] | None:
        """Return the mean log loss and the number of answers from which it was computed.

        None if no true label is a class of the model. If the class names are unknown, also None if
        the table has the column `probabilities`, or if any row lacks the true label in its `top_k`.

        Args:
            left_out: True labels that are not classes of the model.
        """
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
        """Return the expected calibration error (Guo et al., 2017) and the figures of each bin.

        A bin is an interval of predicted probability. All bins have the same width. A probability
        on the edge of two bins belongs to the lower bin.
        """
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
        """Return the accuracy for each true label, lowest accuracy first."""
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
    """Return Wilson's score interval (Wilson, 1927) of the proportion `right / rows`.

    Args:
        right: Number of correct answers.
        rows: Number of answers, at least 1.
        z: Quantile of the normal distribution; the default gives a 95% interval.
    """
    share, z2 = right / rows, z * z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    # The proportion lies within the interval; rounding could exclude it at 0 and 1.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
