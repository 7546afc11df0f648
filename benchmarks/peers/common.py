"""What the competitors share: the split, and how they tell what they have done. Standard library.

A competitor is told what to do by options and tells what it has done as JSON lines on stdout, which
`benchmarks/training/race.py` stamps with its own clock as they arrive.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """path: below the data folder, `CLASS/photo.jpg`; label: its class."""

    path: str
    label: str


def read_split(split: Path, fold: str) -> tuple[list[Sample], list[Sample]]:
    """(train, valid) of a CSV `path,fold`: `fold` validates, other numbers train, `test` rests."""
    train: list[Sample] = []
    valid: list[Sample] = []
    with split.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            part = row["fold"].strip()
            sample = Sample(row["path"], row["path"].partition("/")[0])
            if part == fold:
                valid.append(sample)
            elif part.isdigit():
                train.append(sample)
    return train, valid


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every competitor has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--fold", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="none", help="a state dict of torchvision, or none")
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tta", type=int, default=0, help="0 leaves it out")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the answers")
    return parser


def tell(event: str, **values: Any) -> None:
    """One event; it counts from the moment it is written."""
    print(json.dumps({"event": event, **values}), flush=True)


def write_answers(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write path below the data folder, label and predicted class of every validation photo."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        out.writerow(["path", "label", "predicted"])
        out.writerows(rows)


def versions(*names: str) -> dict[str, str]:
    """Of packages that are there."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
