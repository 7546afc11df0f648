"""What came of a scoring run: for people, as JSON beside the table, and as an exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.errors import DataError, GateError, OptionError, WorkError
from serving.inference.predictor import Predictor
from serving.utils.files import write_aside


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    images: rows of the table; scored: those with an answer.
    errors: code -> count; labels: label -> count; both most frequent first.
    seconds: of this run, without loading the model; now: images that it scored itself.
    skipped: folders, archives and lists that could not be looked into, or not to their end.
    """

    images: int
    scored: int
    errors: Mapping[str, int]
    labels: Mapping[str, int]
    seconds: float
    now: int
    skipped: int = 0

    def __str__(self) -> str:
        """A few lines for people."""
        rate = self.now / max(self.seconds, 1e-9)
        lines = [f"{self.now} images in {self.seconds:.1f} s, {rate:.0f} images/s"]
        lines.append(f"scored: {self.scored}{_counts(self.labels)}")
        if self.errors:
            lines.append(f"errors: {self.images - self.scored}{_counts(self.errors)}")
        if self.skipped:
            lines.append(f"skipped: {self.skipped} (could not be looked into)")
        return "\n".join(lines)

    def write(self, out: Path, predictor: Predictor) -> None:
        """Write OUT.summary.json.

        Raises:
            WorkError: It can't be written.
        """
        facts = {"model": predictor.model, "precision": predictor.precision, **asdict(self)}
        path = out.with_suffix(".summary.json")
        try:
            with write_aside(path) as aside:
                aside.write_text(json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            raise WorkError(f"{path}: {error.strerror or error}") from error

    def judge(self, out: Path, max_errors: str | None) -> None:
        """Fail where too little was scored; the table is complete all the same.

        Raises:
            DataError: There was no input.
            WorkError: Not one image could be scored.
            GateError: More errors than `max_errors`.
        """
        if not self.images:
            raise DataError("there was nothing to score")
        if not self.scored:
            raise WorkError(
                f"not one of {self.images} images could be scored; see the column error of {out}"
            )
        allowed, failed = limit(max_errors), self.images - self.scored
        if allowed is not None and failed > allowed(self.images):
            raise GateError(
                f"{failed} of {self.images} images could not be scored, more than "
                f"--max-errors {max_errors}; see the column error of {out}"
            )


def limit(max_errors: str | None) -> Callable[[int], float] | None:
    """How many errors are allowed among so many images.

    Raises:
        OptionError: Neither a number nor a percentage.
    """
    if max_errors is None:
        return None
    match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)%", max_errors.strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise OptionError(f"--max-errors {max_errors}: use a number, or a percentage such as 5%")
    if match[1]:
        number = int(match[1])
        return lambda images: number
    share = float(match[2])
    return lambda images: images * share / 100


def _counts(counts: Mapping[str, int], most: int = 10) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    if len(counts) > most:
        shown.append(f"and {len(counts) - most} more")
    return f" ({', '.join(shown)})" if shown else ""
