"""Metadata inside an exported file: name, labels and preprocessing of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence

from serving.imaging.preprocess import Preprocess


def metadata(name: str, labels: Sequence[str], preprocess: Preprocess) -> dict[str, str]:
    """The values as JSON texts, by key: "name", "labels", "preprocess"."""
    values = {"name": name, "labels": list(labels), "preprocess": preprocess.to_dict()}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
