"""What a run writes down as it goes: a line an epoch, a line a step, and both for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Final

from serving.utils.files import write_aside
from training.run import events
from training.run.history import Epoch, Step

METRICS: Final = "metrics.csv"
STEPS: Final = "steps.csv"


class MetricLog:
    """metrics.csv, steps.csv and the TensorBoard events of a run's folder."""

    def __init__(self, folder: Path, history: Sequence[Epoch]) -> None:
        """Make the files hold the epochs of `history` and no others: what a kill left goes."""
        self.folder = folder
        done = {(row.stage, str(row.epoch)) for row in history}
        kept = [row for row in _rows(folder / STEPS) if (row[0], row[1]) in done]
        _write(folder / METRICS, Epoch, [astuple(row) for row in history])
        _write(folder / STEPS, Step, kept)
        self.steps = len(kept)
        self.events = events.start(folder, self.steps)

    def add(self, epoch: Epoch, steps: Sequence[Step]) -> None:
        """Append an epoch and its steps."""
        with (self.folder / STEPS).open("a", newline="") as file:
            # Rates deepest layer group first, the head's last.
            csv.writer(file).writerows(
                (*astuple(step)[:-1], " ".join(repr(rate) for rate in step.lr)) for step in steps
            )
        with (self.folder / METRICS).open("a", newline="") as file:
            csv.writer(file).writerow(astuple(epoch))
        for step in steps:
            events.add_step(self.events, self.steps, step.loss, step.lr, step.momentum)
            self.steps += 1
        # At its last step: readers drop what stands at the step with which a resumed run goes on.
        events.add_epoch(self.events, self.steps - 1, epoch)


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


def _rows(path: Path) -> list[list[str]]:
    """The whole lines of steps.csv: a kill may have cut the last one short."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(fields(Step))]


def _write(path: Path, kind: type, rows: Iterable[Sequence[Any]]) -> None:
    with write_aside(path) as aside, aside.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([field.name for field in fields(kind)])
        out.writerows(rows)
