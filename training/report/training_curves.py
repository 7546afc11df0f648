"""The report's account of the training: losses, accuracy, rates, from what the run wrote down."""

from __future__ import annotations

import base64
import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from training.report import charts
from training.report.charts import Series, text
from training.utils.console import Log

POINTS: Final = 400
"""Points of the curve of batch losses, each a mean of its neighbours."""
PICTURE_BYTES: Final = 2_000_000
"""Larger pictures stay out of the page."""


class _Epoch(NamedTuple):
    stage: str
    train_loss: float
    valid_loss: float
    accuracy: float
    seconds: float


def section(folder: Path, log: Log) -> str:
    """Losses, accuracy, the schedule and lr_find, as HTML; what is not there is left out."""
    figures = [*_curves(folder)]
    schedule = folder / "schedule.png"
    if schedule.is_file():
        figures += _picture(
            schedule, "Learning rates", "Every step's rate and momentum, as run.", log
        )
    for path in sorted(folder.glob("lr_find-*.png"), key=lambda path: path.stat().st_mtime):
        stage = path.stem.removeprefix("lr_find-")
        words = "The loss while the rate changes. The rate at the minimum is a trap: far too large."
        figures += _picture(path, f"lr_find before {stage}", words, log)
    if not figures:
        return ""
    return f"""<section>
<h2>How it was trained</h2>
<div class="pair">
{"".join(figures)}</div>
</section>
"""


def seconds(folder: Path) -> float:
    """Seconds of all epochs together; 0 where nothing, or no such number, was written down."""
    total = sum(epoch.seconds for epoch in _epochs(folder))
    return total if math.isfinite(total) else 0.0


def _curves(folder: Path) -> Iterator[str]:
    epochs = _epochs(folder)
    if not epochs:
        return
    bounds = [
        (float(i + 1), epoch.stage)
        for i, epoch in enumerate(epochs)
        if i + 1 == len(epochs) or epochs[i + 1].stage != epoch.stage
    ]

    def curve(name: str, shown: str, colour: str) -> Series:
        points = [(float(i + 1), getattr(epoch, name)) for i, epoch in enumerate(epochs)]
        return Series(points, shown, colour)

    losses = [curve("train_loss", "training", "first"), curve("valid_loss", "validation", "second")]
    batches = _batches(folder, epochs)
    if batches:
        losses.insert(0, Series(batches, "batches", "faint", 1.5))
    yield _card(
        "Loss",
        charts.lines(losses, "Training and validation loss of every epoch", bounds=bounds),
        "Validation above training means that it knows its own photos better than new ones; "
        "training includes augmentation and dropout.",
    )
    best = max(epoch.accuracy for epoch in epochs)
    yield _card(
        "Accuracy",
        charts.lines(
            [curve("accuracy", "validation", "good")],
            f"Validation accuracy of every epoch, {best:.1%} at best",
            bounds=bounds,
            percent=True,
        ),
        f"Of the plain view; {best:.1%} at best, by the weights of best.safetensors.",
    )


def _card(title: str, picture: str, words: str) -> str:
    return (
        f'<figure class="card"><h3><bdi>{text(title)}</bdi></h3>{picture}'
        f"<figcaption>{text(words)}</figcaption></figure>\n"
    )


def _picture(path: Path, title: str, words: str, log: Log) -> Iterator[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        log(f"skipped {path}: {error.strerror or error}")
        return
    if len(content) > PICTURE_BYTES:
        log(f"skipped {path}: {len(content):,} bytes are too many for the report")
        return
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    yield _card(title, f'<img src="{address}" alt="{text(title)}">', words)


def _epochs(folder: Path) -> list[_Epoch]:
    names = _Epoch._fields[1:]
    return [
        _Epoch(row["stage"], *numbers)
        for row in _rows(folder / "metrics.csv")
        if (numbers := _numbers(row, names)) and row.get("stage")
    ]


def _batches(folder: Path, epochs: Sequence[_Epoch]) -> list[tuple[float, float]]:
    """(position in epochs, mean loss) of the steps, thinned to about `POINTS`."""
    by_epoch: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _rows(folder / "steps.csv"):
        if loss := _numbers(row, ("loss",)):
            by_epoch[row.get("stage") or "", row.get("epoch") or ""].append(loss[0])
    # A stage's epochs follow each other in both files, so its n-th here is its n-th there.
    seen: dict[str, int] = defaultdict(int)
    points = []
    for index, epoch in enumerate(epochs):
        seen[epoch.stage] += 1
        losses = by_epoch.get((epoch.stage, str(seen[epoch.stage])), [])
        points += [(index + (i + 1) / len(losses), loss) for i, loss in enumerate(losses)]
    size = max(1, len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(loss for _, loss in g) / len(g)) for g in groups]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def _numbers(row: dict[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    """The named columns as numbers; nothing where one is not."""
    try:
        return tuple(float(row[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()
