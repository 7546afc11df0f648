"""What the scoring peers share: their options, and the table that they write. Standard library."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every peer has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder")
    parser.add_argument("--network", type=Path, required=True, help="as score_network.py wrote it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="CSV: path, label, probability")
    return parser


def write(path: Path, rows: Iterable[tuple[str, str, float]]) -> None:
    """A row a photo: path, label, probability."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "probability"])
        out.writerows(rows)
