"""What a run writes down as it goes: a line an epoch in metrics.csv, a line a step in steps.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Final

from serving.files import write_aside
from training.trainer import Epoch, Step

METRICS: Final = "metrics.csv"
STEPS: Final = "steps.csv"


def rewind(folder: Path, history: Sequence[Epoch]) -> None:
    """Make both files hold the epochs of `history` and no others: what a kill left goes."""
    done = {(row.stage, str(row.epoch)) for row in history}
    kept: list[Sequence[Any]] = []
    width = len(fields(Step))
    if (folder / STEPS).exists():
        with (folder / STEPS).open(newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == width]
        kept = [row for row in rows if (row[0], row[1]) in done]
    _write(folder / METRICS, Epoch, [astuple(row) for row in history])
    _write(folder / STEPS, Step, kept)


def add(folder: Path, epoch: Epoch, steps: Iterable[Step]) -> None:
    """Append an epoch and its steps."""
    with (folder / STEPS).open("a", newline="") as file:
        # Rates deepest layer group first, the head's last.
        csv.writer(file).writerows(
            (*astuple(step)[:-1], " ".join(repr(rate) for rate in step.lr)) for step in steps
        )
    with (folder / METRICS).open("a", newline="") as file:
        csv.writer(file).writerow(astuple(epoch))


def read_steps(folder: Path) -> list[Step]:
    """The steps of a run so far; none where it kept none."""
    if not (folder / STEPS).exists():
        return []
    with (folder / STEPS).open(newline="") as file:
        return [
            Step(
                row["stage"],
                int(row["epoch"]),
                int(row["step"]),
                float(row["loss"]),
                float(row["momentum"]),
                tuple(map(float, row["lr"].split())),
            )
            for row in csv.DictReader(file)
        ]


def _write(path: Path, kind: type, rows: Iterable[Sequence[Any]]) -> None:
    with write_aside(path) as aside, aside.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([field.name for field in fields(kind)])
        out.writerows(rows)
