"""Plot learning rates as PNG: the curve of the range test, and the schedule of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from serving.inputs.file_kinds import SOFTWARE
from serving.utils.files import atomic_write
from training.optim.lr_range_test import Curve, Pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.run.history import Step

BLUE: Final = "#1f5a85"
STYLE: Final[Any] = {
    "font.size": 14,
    "axes.titlesize": 15,
    "legend.fontsize": 13,
    "lines.linewidth": 2,
}


class RateRow(NamedTuple):
    """The learning rates of one training step.

    Attributes:
        stage: Name of the stage.
        epoch: Position in the stage, in epochs from 0.
        rates: Learning rate of each parameter group; the last group is the head.
        momentum: Momentum of SGD, or Adam's first beta.
    """

    stage: str
    epoch: float
    rates: Sequence[float]
    momentum: float


@contextmanager
def _picture(path: Path, height: float) -> Iterator[Figure]:
    """Yield an empty figure, and save it to `path` as PNG at the end of the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        yield figure
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=150, format="png", metadata={"Software": SOFTWARE})


def lr_find(curve: Curve, path: Path, title: str, picked: Pick) -> None:
    """Plot the learning rate range test: loss against rate, suggested rates, and the rate used.

    `picked` is the name of the suggestion that is used. The plot marks the rate with the lowest
    loss as a trap, because it looks best but is too large.
    """
    up = curve.direction == "up"
    trap = "minimum: a trap, too large" if up else "begins to fall: a trap, too large"
    marks = (
        ("valley", curve.valley, "#1b8a2f", (0, (5, 2))),
        ("steepest", curve.steepest, "#e08a00", (0, (1, 1.2))),
        (
            "minimum / 10" if up else "a tenth of the trap",
            curve.tenth_of_minimum,
            "#7a3fa0",
            (0, (3, 2, 1, 2)),
        ),
        (trap, curve.minimum, "#c8283c", (0, (8, 3))),
    )
    taken = curve.pick(picked)
    with _picture(path, 6.0) as figure:
        axes = figure.add_subplot()
        axes.plot(curve.rates, curve.losses, color=BLUE, linewidth=2.5)
        for name, rate, colour, dashes in marks:
            axes.axvline(rate, color=colour, linestyle=dashes, label=f"{name}: {rate:.1e}")
        nearest = min(range(len(curve.rates)), key=lambda i: abs(math.log(curve.rates[i] / taken)))
        axes.plot(
            [taken], [curve.losses[nearest]], "o", color="black", markersize=10, zorder=3,
            label=f"taken: {taken:.1e}",
        )  # fmt: skip
        start = curve.losses[0 if up else -1]
        spread = max(start, min(curve.losses)) - min(curve.losses)
        low, high = min(curve.losses) - 0.1 * spread, start + 0.5 * spread
        axes.set_ylim(low - 0.01, max(high, curve.losses[nearest] + 0.1 * spread) + 0.01)
        axes.set(xscale="log", xlabel="learning rate of the head", ylabel="smoothed loss")
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower left", frameon=False)


def rows(steps: Sequence[Step]) -> list[RateRow]:
    """Convert the steps of a run, in order, to the rows that `schedule` plots."""
    of_epoch = Counter((step.stage, step.epoch) for step in steps)
    return [
        RateRow(
            step.stage,
            step.epoch - 1 + (step.step - 1) / of_epoch[step.stage, step.epoch],
            step.lr,
            step.momentum,
        )
        for step in steps
    ]


def schedule(taken: Sequence[RateRow], path: Path, title: str) -> None:
    """Plot the learning rate of every parameter group at every step, with the stages side by side.

    The axis is logarithmic if the groups' largest rates differ by more than a factor of 30. If the
    momentum changes, a second panel shows it. Without steps the plot is empty.
    """
    stages = [(name, list(part)) for name, part in groupby(taken, key=lambda row: row.stage)]
    moves = len({row.momentum for row in taken}) > 1
    deepest = max((len(row.rates) for row in taken), default=1)
    length = sum(_epochs(part) for _, part in stages)
    peaks = [max(rates) for _, part in stages for rates in _by_group(part)]
    log = bool(peaks) and max(peaks) > 30 * min(peaks) > 0
    with _picture(path, 6.0 if moves else 4.4) as figure:
        heights = [3, 1.3] if moves else [1]
        panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
        axes, lowest = panels[0, 0], panels[-1, 0]
        start = 0.0
        for number, (name, part) in enumerate(stages):
            epochs = [start + row.epoch for row in part]
            marker = "o" if len(part) < 3 else ""
            groups = _by_group(part)
            for depth, rates in enumerate(reversed(groups)):
                label = {deepest - 1: f"deepest of {deepest} groups", 0: "head"}.get(depth)
                known = axes.get_legend_handles_labels()[1]
                axes.plot(
                    epochs, rates, marker=marker, clip_on=not marker, color=_shade(depth, deepest),
                    label=None if label in known else label, zorder=3 - depth / deepest,
                )  # fmt: skip
            if moves:
                momenta = [row.momentum for row in part]
                lowest.plot(epochs, momenta, color="#8a2f6b", marker=marker)
            end = start + _epochs(part)
            if number:
                for panel in panels[:, 0]:
                    panel.axvline(start, color="#555555", linewidth=1, linestyle=":")
            _name(axes, name, (start + end) / 2, (end - start) / length)
            start = end
        if log:
            axes.set_yscale("log")
            axes.set_ylim(min(peaks) / 30, max(peaks) * 2)
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("learning rate")
        for panel in panels[:, 0]:
            panel.grid(alpha=0.3)
            panel.set_xlim(0, max(length, 1))
            panel.xaxis.get_major_locator().set_params(integer=True)
        if moves:
            lowest.set_ylabel("momentum")
        lowest.set_xlabel("epoch")
        figure.suptitle(title, x=0.02, ha="left", fontsize=STYLE["axes.titlesize"])
        if deepest > 1:
            figure.legend(loc="outside lower left", ncols=2, frameon=False)


def _by_group(rows: Sequence[RateRow]) -> list[list[float]]:
    """Return one list per parameter group: the group's learning rate at each step of a stage."""
    return [list(rates) for rates in zip(*(row.rates for row in rows), strict=True)]


def _epochs(rows: Sequence[RateRow]) -> int:
    """Return the number of epochs of a stage; an unfinished epoch counts as one."""
    return max(1, math.ceil(rows[-1].epoch + 1e-6))


def _name(axes: Any, name: str, centre: float, width: float) -> None:
    """Write a stage's name above its part of the plot, rotated if that part is too narrow."""
    axes.annotate(
        name,
        (centre, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=90 if len(name) * 0.024 > width else 0,
        fontsize=13,
        color="#333333",
    )


def _shade(depth: int, deepest: int) -> tuple[float, ...]:
    """Return a layer group's line colour.

    The colour is darkest for the head (depth 0), and lighter at larger depths.
    """
    from matplotlib import colormaps

    colour: tuple[float, ...] = colormaps["viridis"](0.85 * depth / max(deepest - 1, 1))
    return colour
