"""Shared by the scoring peers: options and the CSV table. Standard library only."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every scoring peer."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder")
    parser.add_argument("--network", type=Path, required=True, help="written by score_network.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="CSV: path, label, probability")
    return parser


def write(path: Path, rows: Iterable[tuple[str, str, float]]) -> None:
    """Write a row for each photo: path, label, probability."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "probability"])
        out.writerows(rows)
