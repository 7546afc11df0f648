"""Shared by the training peers: options, the split, events on stdout. Standard library only.

A peer reports its progress as JSON lines on stdout; `benchmarks.training.measurement` takes the
time at which each arrives.
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
    """A photo. path: below the data folder, `CLASS/photo.jpg`. label: its class."""

    path: str
    label: str


def read_split(split: Path, fold: str) -> tuple[list[Sample], list[Sample]]:
    """(train, valid) of a CSV `path,fold`: valid is `fold`, train all other numbers."""
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


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every training peer."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--fold", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="none", help="a torchvision state dict, or none")
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tta", type=int, default=0, help="0: none")
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers")
    return parser


def emit(event: str, **values: Any) -> None:
    """Write one event to stdout."""
    print(json.dumps({"event": event, **values}), flush=True)


def write_answers(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write rows of (path below the data folder, label, predicted class)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        out.writerow(["path", "label", "predicted"])
        out.writerows(rows)


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of the installed packages among `names`."""
    from importlib import metadata

    result = {"python": sys.version.split()[0]}
    for name in names:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result
