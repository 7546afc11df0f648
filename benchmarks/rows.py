"""Rows of measurements: kept line by line, and what is said of those of several rounds."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")
"""A dataclass."""


def asked(peers: str, known: Mapping[str, object]) -> list[str]:
    """The names of --peers, with commas, in that order.

    Raises:
        SystemExit: One that there is none of.
    """
    names = peers.split(",")
    unknown = set(names) - set(known)
    if unknown:
        there = ", ".join(known)
        raise SystemExit(f"--peers: no {', '.join(sorted(unknown))}; there are {there}")
    return names


def jobs(peers: Sequence[Any], rounds: int) -> Iterator[tuple[int, Any, Any]]:
    """(round, peer, setting), round by round, every competitor first in its turn."""
    for turn in range(rounds):
        first = turn % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            for setting in peer.settings:
                yield turn, peer, setting


def append(path: Path, rows: Sequence[Row]) -> None:
    """Keep the rows of one measurement: all of them or none."""
    with path.open("a") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows so far."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [kind(**json.loads(line)) for line in lines if line.endswith("\n")]


def middle(rows: Iterable[Row], what: Callable[[Row], float]) -> float:
    """The median over the rounds."""
    values = [what(row) for row in rows]
    return statistics.median(values) if values else 0.0


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Ours over theirs in the rounds that have both: the median, and the range of several."""
    found = sorted(ours[turn] / theirs[turn] for turn in ours if theirs.get(turn))
    if not found:
        return ""
    middle_one = f"{statistics.median(found):.2f}"
    return middle_one + (f" ({found[0]:.2f} to {found[-1]:.2f})" if len(found) > 1 else "")
