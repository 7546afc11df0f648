"""Rows and column names of the table of scores. A row is the result for one image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from serving.errors import FledgeError
from serving.imaging.limits import VARIABLE

Features = npt.NDArray[np.float32]
"""Features of N images, float32 [N, D]; nan for an image that could not be scored."""


@dataclass(frozen=True)
class ScoreRow:
    """Result for one image. The fields are the columns of the table, in this order.

    Attributes:
        path: Name of the image: a path, an address, or ARCHIVE::MEMBER.
        status: "ok" or "error".
        label: The most probable label; None for an error.
        probability: Probability of `label`.
        confident: Whether `probability` reaches the bundle's threshold; None if the bundle has
            no threshold.
        top_k: (label, probability) pairs of the most probable classes, most probable first. Written
            as JSON in CSV files.
        views: Number of TTA views (crops or flips) whose predictions were averaged.
        applied: Pixel conversions that were applied to the image, joined by ";".
        error: "code: message", with the error code that the HTTP service returns; "" if the image
            was scored.
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
        """Create the row of a scored image.

        Args:
            path: Name of the image.
            answer: Answer returned by `Predictor.answer`.
            probabilities: Probabilities of all classes; None if not requested.
        """
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
        """Create the row of an image that could not be scored."""
        message = " ".join(str(error).split())
        # The option of `fledge score`, which goes before the variable.
        message = message.replace(f"({VARIABLE})", "(--max-pixels)")
        return cls(path, "error", error=f"{error.code}: {message}")

    def to_json(self) -> str:
        """Return the row as a line of JSON.

        The line is ASCII, so a path that is not UTF-8 remains valid JSON.
        """
        return json.dumps(vars(self)) + "\n"

    @classmethod
    def from_json(cls, line: str) -> ScoreRow:
        """Create a row from a line written by `to_json`.

        Raises:
            ValueError: The line is damaged.
        """
        try:
            values = json.loads(line)
            probabilities = values["probabilities"]
            values["probabilities"] = None if probabilities is None else tuple(probabilities)
            values["top_k"] = tuple((label, probability) for label, probability in values["top_k"])
            row = cls(**values)
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"not a row of scores: {error}") from error
        numbers = (*(row.probabilities or ()), *(probability for _, probability in row.top_k))
        if (
            not all(isinstance(getattr(row, name), kind) for name, kind in _KINDS.items())
            or not all(isinstance(label, str) for label, _ in row.top_k)
            or not all(isinstance(number, float | int) for number in numbers)
        ):
            raise ValueError("not a row of scores: a value has another type")
        if "\\u" in line:  # a table can have an escaped byte of a path, but no other surrogate
            json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return row


_KINDS: Final = {
    "path": str,
    "status": str,
    "label": str | None,
    "probability": float | int | None,
    "confident": bool | None,
    "views": int | None,
    "applied": str,
    "error": str,
}
"""Types of the fields of a `ScoreRow`, except for the pairs and the list of probabilities."""

PROBABILITIES: Final = "probabilities"
"""Name of the optional column of all class probabilities."""
FEATURES: Final = "features"
"""Name of the optional column of features, in Parquet only. `ScoreRow` does not contain it."""
COLUMNS: Final = tuple(item.name for item in fields(ScoreRow) if item.name != PROBABILITIES)
"""Names of the columns that every table has."""
