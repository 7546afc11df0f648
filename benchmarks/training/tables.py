"""Markdown tables and the picture of a training race."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.training.measurement import Outcome

NAMES: Final = {"fledge": "Fledge", "fastai": "fastai `fine_tune`", "torch": "plain torch loop"}
COLOURS: Final = {"fledge": "#1f5a85", "fastai": "#c8283c", "torch": "#7a7a7a"}
DRAWS: Final = 10_000
"""Bootstrap samples."""

Pair = tuple[Outcome, Outcome]
"""(Fledge's, the peer's) of the same fold and seed."""


def markdown(outcomes: Sequence[Outcome]) -> str:
    """All tables of the outcomes so far."""
    peers = [peer for peer in NAMES if any(o.peer == peer for o in outcomes)]
    parts = [_peers(outcomes, peers)]
    for peer in peers:
        pairs = _pairs(outcomes, peer)
        if peer != "fledge" and pairs:
            parts += [_comparison(pairs, peer), _at_epoch_ends(pairs, peer)]
    return "\n\n".join(parts)


def _peers(outcomes: Sequence[Outcome], peers: Sequence[str]) -> str:
    lines = [
        "| | runs | photos | s, median (range) | accuracy % | last epoch % | with TTA % | TTA s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in peers:
        own = [o for o in outcomes if o.peer == peer]
        seconds = sorted(o.seconds for o in own)
        tta = [o.tta_seconds for o in own if "tta" in o.right]
        cells = [
            *(NAMES[peer], str(len(own)), str(sum(len(o.right["plain"]) for o in own))),
            f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
            *(_percent(own, "plain"), f"{100 * _last_epoch(own):.2f}", _percent(own, "tta")),
            f"{statistics.median(tta):.1f}" if tta else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(outcomes: Sequence[Outcome], views: str) -> str:
    """Accuracy over all photos of all runs; empty if a run has no answers for `views`."""
    if any(views not in o.right for o in outcomes):
        return ""
    right = [value for o in outcomes for value in o.right[views].values()]
    return f"{100 * statistics.mean(right):.2f}"


def _last_epoch(outcomes: Sequence[Outcome]) -> float:
    """Accuracy of the last epoch, averaged over all validation photos."""
    return float(
        np.average([o.epochs[-1][1] for o in outcomes], weights=[o.photos[1] for o in outcomes])
    )


def _pairs(outcomes: Sequence[Outcome], peer: str) -> list[Pair]:
    """The runs of Fledge and of `peer` with the same fold and seed."""
    theirs = {(o.fold, o.seed): o for o in outcomes if o.peer == peer}
    ours = [o for o in outcomes if o.peer == "fledge" and (o.fold, o.seed) in theirs]
    return [(o, theirs[o.fold, o.seed]) for o in ours]


def _comparison(pairs: Sequence[Pair], peer: str) -> str:
    ratios = sorted(ours.seconds / theirs.seconds for ours, theirs in pairs)
    lines = [
        f"Fledge against {NAMES[peer]}, {len(pairs)} pairs of the same fold and seed:",
        "",
        f"- seconds: {statistics.median(ratios):.3f} times theirs, the median of the pairs "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})",
    ]
    for views, label in (("plain", "without TTA"), ("tta", "with TTA")):
        if all(views in o.right for pair in pairs for o in pair):
            mean, low, high, photos = difference(pairs, views)
            lines.append(
                f"- accuracy {label}: {100 * mean:+.2f} points "
                f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f}, {photos} photos)"
            )
    last = np.average(
        [ours.epochs[-1][1] - theirs.epochs[-1][1] for ours, theirs in pairs],
        weights=[ours.photos[1] for ours, _ in pairs],
    )
    lines.append(f"- accuracy of the last epochs: {100 * last:+.2f} points")
    return "\n".join(lines)


def difference(pairs: Sequence[Pair], views: str) -> tuple[float, float, float, int]:
    """Fledge's accuracy less the peer's over all folds: mean, 95 % interval, number of photos.

    A photo counts once, with its mean over the seeds. The interval is a percentile bootstrap over
    photos (Efron, 1979): it covers other photos of this kind, not other training runs.
    """
    by_photo: dict[str, list[int]] = {}
    for ours, theirs in pairs:
        own, other = ours.right[views], theirs.right[views]
        if own.keys() != other.keys():
            raise ValueError(
                f"fold {ours.fold}: {ours.peer} and {theirs.peer} have different validation photos"
            )
        for path in own:
            by_photo.setdefault(path, []).append(own[path] - other[path])
    means = np.array([statistics.mean(values) for values in by_photo.values()])
    rng = np.random.default_rng(0)
    draws = [means[rng.integers(len(means), size=len(means))].mean() for _ in range(DRAWS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(means.mean()), float(low), float(high), len(means)


def _at_epoch_ends(pairs: Sequence[Pair], peer: str) -> str:
    """Accuracy of both at the end of each of the peer's epochs."""
    lines = [
        f"At the ends of the epochs of {NAMES[peer]}, at the same seconds since the start:",
        "",
        "| their epoch | at s, median | theirs % | Fledge % | Fledge higher, equal, lower |",
        "|---:|---:|---:|---:|---|",
    ]
    for i in range(min(len(theirs.epochs) for _, theirs in pairs)):
        moments = [theirs.epochs[i] for _, theirs in pairs]
        ours = [accuracy_at(mine, at) for (mine, _), (at, _) in zip(pairs, moments, strict=True)]
        weights = [mine.photos[1] for mine, _ in pairs]
        signs = [
            (mine > other) - (mine < other) for mine, (_, other) in zip(ours, moments, strict=True)
        ]
        cells = [
            *(str(i + 1), f"{statistics.median(at for at, _ in moments):.1f}"),
            f"{100 * np.average([accuracy for _, accuracy in moments], weights=weights):.2f}",
            f"{100 * np.average(ours, weights=weights):.2f}",
            f"{signs.count(1)}, {signs.count(0)}, {signs.count(-1)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy_at(outcome: Outcome, seconds: float) -> float:
    """Accuracy of the best checkpoint on disk `seconds` after the start; 0 if there is none."""
    return max((accuracy for at, accuracy in outcome.epochs if at <= seconds), default=0.0)


def picture(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Plot accuracy against wall clock: runs as thin lines, their mean bold. PNG or SVG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context({"font.size": 13, "svg.hashsalt": "fledge"}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        lowest = 1.0
        for peer, name in NAMES.items():
            runs = [o.epochs for o in outcomes if o.peer == peer]
            for epochs in runs:
                axes.plot(*zip(*epochs, strict=True), color=COLOURS[peer], alpha=0.2, linewidth=1)
            if runs:
                shortest = min(map(len, runs))
                mean = np.mean([epochs[:shortest] for epochs in runs], axis=0)
                label = name.replace("`", "")
                axes.plot(*mean.T, "o-", color=COLOURS[peer], linewidth=2.5, label=label)
                lowest = min(lowest, float(mean[:, 1].min()))
        axes.set_xscale("log")
        axes.set_ylim(max(0.0, lowest - 0.02), 1.0)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        axes.set(xlabel="seconds from process start", ylabel="validation accuracy, %")
        axes.set_title(title, loc="left", fontsize=13)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, dpi=110)
