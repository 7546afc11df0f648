"""results.jsonl: appending and reading rows, the order of measurements, medians and ratios."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

FILE: Final = "results.jsonl"
TOLERANCE: Final = 0.05
"""Highest share of answers with another best label than the reference's that passes as rounding."""
Row = TypeVar("Row")
"""A dataclass."""


def parse_names(names: str, known: Iterable[str], option: str) -> list[str]:
    """The comma-separated names in the value of an option, each once, in their order.

    Raises:
        SystemExit: A name is unknown.
    """
    there = list(known)
    chosen = list(dict.fromkeys(names.split(",")))
    if unknown := sorted(set(chosen) - set(there)):
        raise SystemExit(f"{option}: no {', '.join(unknown)}; there are {', '.join(there)}")
    return chosen


def jobs(
    peers: Sequence[Any], rounds: int, contexts: Sequence[Any]
) -> Iterator[tuple[int, Any, Any, Any]]:
    """(round, context, peer, setting), round by round; each round starts with the next peer.

    Within a round the contexts (kinds of photos) follow one another.
    """
    for number in range(rounds):
        first = number % len(peers)
        for context in contexts:
            for peer in [*peers[first:], *peers[:first]]:
                for setting in peer.settings:
                    yield number, context, peer, setting


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append the rows of one measurement in one write, and sync the file to disk."""
    with path.open("a") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: type[Row]) -> list[Row]:
    """All rows of the file; a last line without a newline is incomplete and left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [kind(**json.loads(line)) for line in lines if line.endswith("\n")]


def median_of(rows: Iterable[Row], value: Callable[[Row], float]) -> float:
    """The median of `value` over the rows; 0 without rows."""
    values = [value(row) for row in rows]
    return statistics.median(values) if values else 0.0


def format_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Ours over theirs in the rounds that have both: the median, and the range of several."""
    ratios = sorted(ours[number] / theirs[number] for number in ours if theirs.get(number))
    if not ratios:
        return ""
    median = f"{statistics.median(ratios):.2f}"
    return median + (f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else "")


def other_labels(rows: Iterable[Any]) -> str:
    """Share of answers with another best label than the reference's, apart for turned photos.

    Rows have `answers` and `others`, and `turned` and `turned_others`, which are part of them.
    """
    upright, turned = _shares(list(rows))
    return (
        _percent(upright) if turned is None else f"{_percent(upright)}, turned {_percent(turned)}"
    )


def disagreements(peers: Iterable[Any], rows: Sequence[Any]) -> list[str]:
    """A line for each peer whose best labels differ from the reference's by more than `TOLERANCE`.

    Turned photos count for Fledge alone: other programs need not heed the EXIF orientation.
    """
    lines = []
    for peer in peers:
        upright, turned = _shares([row for row in rows if row.peer == peer.name])
        share = max(upright, turned or 0) if peer.name.startswith("fledge") else upright
        if share > TOLERANCE:
            lines.append(
                f"{peer.name}: {100 * share:.1f} % other labels, where {100 * TOLERANCE:.0f} % may "
                "be rounding: it does other work"
            )
    return lines


def _shares(rows: Sequence[Any]) -> tuple[float, float | None]:
    """Share of other labels among upright photos and among turned ones; None if there are none."""
    answers, others = sum(row.answers for row in rows), sum(row.others for row in rows)
    turned, turned_others = (
        sum(row.turned for row in rows),
        sum(row.turned_others for row in rows),
    )
    upright = (others - turned_others) / max(1, answers - turned)
    return upright, turned_others / turned if turned else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share else "0"


def format_rate(rate: float) -> str:
    """Photos or answers per second, with two digits at least."""
    return f"{rate:.0f}" if rate >= 9.95 else f"{rate:.1f}"
