"""Build the metadata that is stored in an exported file: model name, labels and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from serving.imaging.preprocess import Preprocess


def metadata(name: str, labels: Sequence[str], preprocess: Preprocess) -> dict[str, str]:
    """Return the values as JSON texts under the keys "name", "labels" and "preprocess"."""
    values = {"name": name, "labels": list(labels), "preprocess": preprocess.to_dict()}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
