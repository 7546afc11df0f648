"""Compute the table of an ablation, and write it to the screen and as CSV, Markdown and PNG."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from serving.inputs.file_kinds import SOFTWARE
from serving.terminal import escape
from serving.utils.files import atomic_write
from training.ablation.ablation import AblationRun, Trials
from training.ablation.tricks import Trick
from training.config.schema import Recipe
from training.run import checkpoint
from training.utils.console import pluralize

CSV: Final = "ablation.csv"
PAGE: Final = "ablation.md"
PICTURE: Final = "ablation.png"
COLUMNS: Final = (
    "row", "against", "runs", "accuracy", "accuracy_half", "difference", "difference_half",
    "seconds", "what", "error",
)  # fmt: skip


class Interval(NamedTuple):
    """A mean of several runs and its 95 % confidence interval.

    mean: The mean; NaN without runs. half: Half the width of the interval; NaN with less than 2
    runs. runs: Number of runs.
    """

    mean: float
    half: float
    runs: int


@dataclass(frozen=True)
class TableRow:
    """The statistics of a table row.

    Attributes:
        row: Name of the row.
        against: Name of the row with which this row is compared, or empty.
        what: Description of the change.
        accuracies: Name of each seed or fold -> accuracy from 0 to 1.
        accuracy: Mean of the accuracies, with its interval.
        difference: Mean paired difference to the accuracies of `against`, with its interval.
        seconds: Mean duration of a run in seconds.
        error: Error of the first run that failed, or empty.
    """

    row: str
    against: str
    what: str
    accuracies: dict[str, float]
    accuracy: Interval
    difference: Interval
    seconds: float
    error: str


def interval(values: Sequence[float], overlap: float = 0.0) -> Interval:
    """Return the mean of values and its 95 % interval by Student's t.

    Args:
        values: Accuracies or differences, one for each run.
        overlap: Correction of the variance for runs on folds: their training sets share photos, so
            the values are correlated and the variance of the mean is larger (Nadeau & Bengio, 2003,
            "Inference for the Generalization Error", section 3). Pass the number of validation
            photos divided by the number of training photos for folds, and 0 for seeds.
    """
    from scipy import stats  # takes a second to import

    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, n)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance * (1 / n + overlap))
    return Interval(mean, half, n)


def difference(
    values: Mapping[str, float], others: Mapping[str, float], overlap: float = 0.0
) -> Interval:
    """Return the mean of the paired differences `values - others`, with its 95 % interval.

    Values are paired by seed or fold. Runs with the same seed or fold use the same photos in the
    same order, so a paired difference varies less than the difference of the two means. `overlap`
    is explained in `interval`.
    """
    return interval([values[unit] - others[unit] for unit in values if unit in others], overlap)


def lines(rows: Sequence[Trick], trials: Trials, against: str = "") -> list[TableRow]:
    """Return the statistics of every table row.

    Args:
        rows: The table rows that were run.
        trials: Result of `ablation.run`.
        against: Name of the row with which all rows are compared. "" compares each row with the row
            whose recipe it changes.
    """
    values = {row.name: _accuracies(row, trials[row.name]) for row in rows}
    table_rows = []
    for row in rows:
        other = (against or row.on) if row.name != against else ""
        other = other if other in values else ""  # the row that it changes may not be among `rows`
        runs = list(trials[row.name].values())
        folds = [run for unit, run in trials[row.name].items() if unit.startswith("fold")]
        overlap = sum(run.valid for run in folds) / max(sum(run.train for run in folds), 1)
        error = next((trial.error for trial in runs if trial.error), "")
        table_rows.append(
            TableRow(
                row.name,
                other,
                row.what,
                values[row.name],
                interval(list(values[row.name].values()), overlap),
                difference(values[row.name], values.get(other, {}), overlap),
                sum(trial.seconds for trial in runs) / len(runs),
                error,
            )
        )
    return table_rows


def _accuracies(row: Trick, trials: dict[str, AblationRun]) -> dict[str, float]:
    accuracies = {unit: getattr(trial, row.metric) for unit, trial in trials.items()}
    return {unit: value for unit, value in accuracies.items() if value is not None}


def percent(value: Interval, signed: bool = False) -> str:
    """Format a mean and its interval in percent, such as `95.31 ± 1.20`; "" without runs.

    "±" is left out if there is only one run, or if all runs have equal values.
    """
    if not value.runs:
        return ""
    mean = f"{100 * value.mean:{'+' if signed else ''}.2f}"
    return f"{mean} ± {100 * value.half:.2f}" if value.half > 0 else mean


def show(found: Sequence[TableRow], stream: TextIO | None = None) -> None:
    """Print the table to `stream`; default: stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream or sys.stdout, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("row", "accuracy %", "against", "difference", "s"):
        table.add_column(title, justify="left" if title in ("row", "against") else "right")
    for line in found:
        low, high = _ends(line.difference)
        colour = "green" if low > 0 else "red" if high < 0 else ""
        table.add_row(
            line.row,
            percent(line.accuracy) or "failed",
            line.against,
            Text(percent(line.difference, signed=True), style=colour),
            f"{line.seconds:.0f}",
        )
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    for line in found:
        if line.error:
            console.print(f"{line.row}: {escape(line.error)}", markup=False, soft_wrap=True)


def _ends(value: Interval) -> tuple[float, float]:
    if not value.half:  # equal values by chance (accuracies are counts): no significance
        return math.nan, math.nan
    return value.mean - value.half, value.mean + value.half


def about(base: Recipe, source: str, trials: Trials, device: str) -> str:
    """Return a paragraph on recipe, data, machine and package versions, for the Markdown page."""
    import torch

    runs = [trial for row in trials.values() for trial in row.values() if not trial.error]
    units = list(dict.fromkeys(unit for row in trials.values() for unit in row))
    cuda = device != "cpu" and torch.cuda.is_available()
    threads = pluralize(torch.get_num_threads(), "CPU thread")
    machine = torch.cuda.get_device_name() if cuda else threads
    versions = checkpoint.versions()
    epochs = pluralize(sum(stage.epochs for stage in base.stage), "epoch")
    return (
        f"Recipe `{base.name}`: {base.arch} at {base.preprocess.size} px, "
        f"{epochs}, on {runs[0].train} photos of "
        f"`{Path(source).name}`, validated on {runs[0].valid}; {', '.join(units)}. Means with 95 % "
        f"intervals (Student's t); differences are paired. Measured on {machine}, "
        f"torch {versions['torch']}, torchvision {versions['torchvision']}."
    )


def write(found: Sequence[TableRow], folder: Path, title: str, how: str) -> None:
    """Write the table as CSV, Markdown and PNG.

    Args:
        found: The rows of the table.
        folder: Folder for the three files.
        title: Title of the Markdown page and of the picture.
        how: Text on how the figures were measured, such as the result of `about`.
    """
    with (
        atomic_write(folder / CSV) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for line in found:
            out.writerow([
                line.row, line.against, line.accuracy.runs,
                *map(_number, (*line.accuracy[:2], *line.difference[:2])),
                f"{line.seconds:.1f}", line.what, line.error,
            ])  # fmt: skip
    with atomic_write(folder / PAGE) as partial:
        partial.write_text(page(found, title, how), encoding="utf-8", errors="backslashreplace")
    _draw(found, folder / PICTURE, title)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def page(found: Sequence[TableRow], title: str, how: str) -> str:
    """Format the table as a Markdown page."""
    text = [
        f"# {title}\n",
        f"{how}\n",
        f"![accuracy and differences]({PICTURE})\n",
        "| row | what changes | accuracy % | against | difference | s |",
        "|---|---|---:|---|---:|---:|",
    ]
    for line in found:
        against = f"`{line.against}`" if line.against else ""
        text.append(
            f"| `{line.row}` | {line.what} | {percent(line.accuracy) or 'failed'} | {against} | "
            f"{percent(line.difference, signed=True)} | {line.seconds:.0f} |"
        )
    failed = [f"- `{line.row}` failed: {line.error}" for line in found if line.error]
    return "\n".join([*text, *(["", *failed] if failed else [])]) + "\n"


def _draw(found: Sequence[TableRow], path: Path, title: str) -> None:
    """Plot accuracies on the left, one dot per run, and paired differences on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 1.5 + 0.42 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [5, 4]})
    for y, line in enumerate(found):
        runs = [100 * value for value in line.accuracies.values()]
        left.plot(runs, [y + 0.25] * len(runs), "o", color="#33658a", alpha=0.5, markersize=4)
        _mark(left, line.accuracy, y, "#33658a", (0, 1))
        low, high = _ends(line.difference)
        colour = "#2a9d3a" if low > 0 else "#d1495b" if high < 0 else "#777777"
        _mark(right, line.difference, y, colour, (-1, 1))
        if not line.accuracy.runs:
            left.annotate("failed", (0.5, y), xycoords=("axes fraction", "data"),
                          ha="center", va="center", color="#d1495b")  # fmt: skip
    names = [line.row + (f"\nagainst {line.against}" if line.against else "") for line in found]
    left.set_yticks(range(len(found)), names, fontsize=8)
    left.set_ylim(len(found) - 0.5, -0.5)
    left.set_xlabel("validation accuracy, %; a dot a run")
    left.set_xlim(*_readable(left.get_xlim(), found))
    right.set_xlabel("paired difference, points")
    right.axvline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.tick_params(left=False)
    figure.suptitle(f"{title}: mean and 95 % interval", fontsize=11)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png", metadata={"Software": SOFTWARE})


def _readable(limits: tuple[float, float], found: Sequence[TableRow]) -> tuple[float, float]:
    """Return the limits of the accuracy axis.

    Intervals that are much wider than the range of the dots are cut off.
    """
    dots = [100 * value for line in found for value in line.accuracies.values()]
    margin = 3 * max(max(dots, default=0.0) - min(dots, default=0.0), 1.0)
    low = max(limits[0], min(dots, default=0.0) - margin, -0.5)
    return low, min(limits[1], max(dots, default=100.0) + margin, 100.5)


def _mark(axes: Any, value: Interval, y: int, colour: str, ends: tuple[float, float]) -> None:
    """Plot a mean and its interval. The interval is cut off at `ends`.

    ends: Lowest and highest possible value.
    """
    if value.runs:
        half = 0.0 if math.isnan(value.half) else value.half
        below, above = min(half, value.mean - ends[0]), min(half, ends[1] - value.mean)
        xerr = [[100 * below], [100 * above]] if half else None
        axes.errorbar(
            100 * value.mean, y, xerr=xerr, fmt="D", color=colour, capsize=4, markersize=6
        )
