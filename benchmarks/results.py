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
Row = TypeVar("Row")
"""A dataclass."""


def parse_peers(names: str, known: Mapping[str, object]) -> list[str]:
    """The names in the value of --peers, in their order.

    Raises:
        SystemExit: A name is unknown.
    """
    chosen = names.split(",")
    unknown = set(chosen) - set(known)
    if unknown:
        there = ", ".join(known)
        raise SystemExit(f"--peers: no {', '.join(sorted(unknown))}; there are {there}")
    return chosen


def jobs(peers: Sequence[Any], rounds: int) -> Iterator[tuple[int, Any, Any]]:
    """(round, peer, setting), round by round; each round starts with the next peer."""
    for number in range(rounds):
        first = number % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            for setting in peer.settings:
                yield number, peer, setting


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
