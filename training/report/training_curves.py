"""Draw the report's training figures: losses, accuracy and learning rates from the run's files."""

from __future__ import annotations

import base64
import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from markupsafe import Markup

from training.report import charts
from training.report.charts import Series
from training.utils.console import Log

POINTS: Final = 400
"""Most points of the curve of batch losses; each is the mean of a group of steps."""
PICTURE_BYTES: Final = 2_000_000
"""Larger PNG files are left out of the page."""


class _Epoch(NamedTuple):
    stage: str
    train_loss: float
    valid_loss: float
    accuracy: float
    seconds: float


class Figure(NamedTuple):
    """A figure of the report: either an SVG `chart`, or a `picture` as a PNG data URL."""

    title: str
    caption: str
    chart: Markup | None = None
    picture: str = ""


def figures(folder: Path, log: Log) -> list[Figure]:
    """Return the figures of a run folder: losses, accuracy, schedule and learning rate range tests.

    Figures without data are left out.
    """
    found = [*_curves(folder, log)]
    schedule = folder / "schedule.png"
    if schedule.is_file():
        caption = "Every step's rate and momentum, as run."
        found += _picture(schedule, "Learning rates", caption, log)
    for path in sorted(folder.glob("lr_find-*.png"), key=lambda path: path.stat().st_mtime):
        stage = path.stem.removeprefix("lr_find-")
        caption = (
            "The loss while the rate changes. The rate at the minimum is a trap: far too large."
        )
        found += _picture(path, f"lr_find before {stage}", caption, log)
    return found


def seconds(folder: Path, log: Log) -> float:
    """Return the total duration of all epochs in seconds.

    The result is 0 if metrics.csv is missing or unreadable, or if the total is not finite.
    """
    total = sum(epoch.seconds for epoch in _epochs(folder, log))
    return total if math.isfinite(total) else 0.0


def _curves(folder: Path, log: Log) -> Iterator[Figure]:
    epochs = _epochs(folder, log)
    if not epochs:
        return
    bounds = [
        (float(i + 1), epoch.stage)
        for i, epoch in enumerate(epochs)
        if i + 1 == len(epochs) or epochs[i + 1].stage != epoch.stage
    ]

    def curve(name: str, label: str, colour: str) -> Series:
        points = [(float(i + 1), getattr(epoch, name)) for i, epoch in enumerate(epochs)]
        return Series(points, label, colour)

    losses = [curve("train_loss", "training", "first"), curve("valid_loss", "validation", "second")]
    batches = _batches(folder, epochs, log)
    if batches:
        losses.insert(0, Series(batches, "batches", "faint", 1.5))
    yield Figure(
        "Loss",
        "Validation above training means that it knows its own photos better than new ones; "
        "training includes augmentation and dropout.",
        charts.lines(losses, "Training and validation loss of every epoch", bounds=bounds),
    )
    best = max(epoch.accuracy for epoch in epochs)
    yield Figure(
        "Accuracy",
        f"Of the plain view; {best:.1%} at best, by the weights of best.safetensors.",
        charts.lines(
            [curve("accuracy", "validation", "good")],
            f"Validation accuracy of every epoch, {best:.1%} at best",
            bounds=bounds,
            percent=True,
        ),
    )


def _picture(path: Path, title: str, caption: str, log: Log) -> Iterator[Figure]:
    try:
        content = path.read_bytes()
    except OSError as error:
        log(f"skipped {path}: {error.strerror or error}")
        return
    if len(content) > PICTURE_BYTES:
        log(f"skipped {path}: {len(content):,} bytes are too many for the report")
        return
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    yield Figure(title, caption, picture=url)


def _epochs(folder: Path, log: Log) -> list[_Epoch]:
    names = _Epoch._fields[1:]
    return [
        _Epoch(row["stage"], *numbers)
        for row in _rows(folder / "metrics.csv", log)
        if (numbers := _numbers(row, names)) and row.get("stage")
    ]


def _batches(folder: Path, epochs: Sequence[_Epoch], log: Log) -> list[tuple[float, float]]:
    """Return about `POINTS` points (position in epochs, mean batch loss) for the loss curve.

    Each point is the mean of several successive steps.
    """
    by_epoch: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _rows(folder / "steps.csv", log):
        if loss := _numbers(row, ("loss",)):
            by_epoch[row.get("stage") or "", row.get("epoch") or ""].append(loss[0])
    # steps.csv counts epochs within a stage, from 1; metrics.csv lists them in the same order.
    seen: dict[str, int] = defaultdict(int)
    points = []
    for index, epoch in enumerate(epochs):
        seen[epoch.stage] += 1
        losses = by_epoch.get((epoch.stage, str(seen[epoch.stage])), [])
        points += [(index + (i + 1) / len(losses), loss) for i, loss in enumerate(losses)]
    size = max(1, len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(loss for _, loss in g) / len(g)) for g in groups]


def _rows(path: Path, log: Log) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        log(f"skipped {path}: {getattr(error, 'strerror', None) or error}")
        return []


def _numbers(row: dict[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    """Return the named columns as numbers; an empty tuple if one of them is not a number."""
    try:
        return tuple(float(row[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()
