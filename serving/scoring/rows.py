"""A row of the table of scores, and the names of its columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from serving.errors import FledgeError

Features = npt.NDArray[np.float32]
"""The network's features, float32 [N, D]; nan for a broken image."""


@dataclass(frozen=True)
class ScoreRow:
    """The result of one input. The fields are the table's columns, in this order.

    Attributes:
        path: Name of the input, as given or found.
        status: "ok" or "error".
        label: The most probable label.
        probability: Probability of `label`.
        confident: None if the bundle has no threshold.
        top_k: (label, probability) pairs, most probable first; in CSV as JSON.
        views: Number of views that were averaged.
        applied: Pixel conversions of the image, joined by ";".
        error: "code: message", with the code that the HTTP service returns.
        probabilities: Probabilities of all classes, in the order of the model's labels; None if not
            requested.
    """

    path: str
    status: str
    label: str | None = None
    probability: float | None = None
    confident: bool | None = None
    top_k: tuple[tuple[str, float], ...] = ()
    views: int | None = None
    applied: str = ""
    error: str = ""
    probabilities: tuple[float, ...] | None = None

    @classmethod
    def of_answer(
        cls, path: str, answer: dict[str, Any], probabilities: Sequence[float] | None = None
    ) -> ScoreRow:
        """The row of an answer in the format of `Predictor.answer`."""
        top_k = tuple((item["label"], item["probability"]) for item in answer["predictions"])
        label, probability = top_k[0]
        return cls(
            path,
            "ok",
            label,
            probability,
            answer["confident"],
            top_k,
            answer["views"],
            ";".join(answer["applied"]),
            probabilities=None if probabilities is None else tuple(probabilities),
        )

    @classmethod
    def of_error(cls, path: str, error: FledgeError) -> ScoreRow:
        """The row of an input that can't be scored."""
        message = " ".join(str(error).split())
        return cls(path, "error", error=f"{error.code}: {message}")

    def to_json(self) -> str:
        """A line of JSON. ASCII only, so that a path that is not UTF-8 remains valid JSON."""
        return json.dumps(vars(self)) + "\n"

    @classmethod
    def from_json(cls, line: str) -> ScoreRow:
        """The inverse of `to_json`."""
        values = json.loads(line)
        probabilities = values["probabilities"]
        values["probabilities"] = None if probabilities is None else tuple(probabilities)
        values["top_k"] = tuple((label, probability) for label, probability in values["top_k"])
        return cls(**values)


PROBABILITIES: Final = "probabilities"
"""An optional column."""
FEATURES: Final = "features"
"""An optional column, of Parquet only; its values are not part of `ScoreRow`."""
COLUMNS: Final = tuple(item.name for item in fields(ScoreRow) if item.name != PROBABILITIES)
"""The columns that every table has."""
