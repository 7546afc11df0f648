"""Summary of a scoring run: printed lines, a JSON file beside the table, the exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import DataError, GateError, OptionError, WorkError
from serving.utils.files import atomic_write

if TYPE_CHECKING:  # `fledge evaluate-scores` reads summaries and needs no model
    from serving.inference.predictor import Predictor


@dataclass(frozen=True)
class Summary:
    """Figures of a run.

    Attributes:
        images: Number of rows of the table.
        scored: Number of rows with an answer.
        errors: Error code -> number of rows, most frequent first.
        labels: Predicted label -> number of rows, most frequent first.
        seconds: Duration of this run, without loading the model.
        now: Number of images that this run scored, without those of earlier interrupted runs.
        skipped: Number of folders, archives and lists that could not be read completely.
    """

    images: int
    scored: int
    errors: Mapping[str, int]
    labels: Mapping[str, int]
    seconds: float
    now: int
    skipped: int = 0

    def __str__(self) -> str:
        """The lines to print."""
        rate = self.now / max(self.seconds, 1e-9)
        lines = [f"{self.now} images in {self.seconds:.1f} s, {rate:.0f} images/s"]
        lines.append(f"scored: {self.scored}{_counts(self.labels)}")
        if self.errors:
            lines.append(f"errors: {self.images - self.scored}{_counts(self.errors)}")
        if self.skipped:
            lines.append(f"skipped: {self.skipped} (could not be read)")
        return "\n".join(lines)

    def write(self, out: Path, predictor: Predictor) -> None:
        """Write the summary of the table `out`, with the model's class names in their order.

        Raises:
            WorkError: The file can't be written.
        """
        content = {
            "model": predictor.model,
            "precision": predictor.precision,
            **asdict(self),
            "classes": list(predictor.manifest.labels),
        }
        path = summary_path(out)
        try:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise WorkError(f"{path}: {error.strerror or error}") from error

    def check(self, out: Path, max_errors: str | None) -> None:
        """Raise an error if too few images were scored; the table is complete anyway.

        Raises:
            DataError: There was no input.
            WorkError: No image could be scored.
            GateError: More errors than `max_errors`.
        """
        if not self.images:
            raise DataError("there was nothing to score")
        if not self.scored:
            raise WorkError(
                f"not one of {self.images} images could be scored; see the column error of {out}"
            )
        allowed, failed = parse_error_limit(max_errors), self.images - self.scored
        if allowed is not None and failed > allowed(self.images):
            raise GateError(
                f"{failed} of {self.images} images could not be scored, more than "
                f"--max-errors {max_errors}; see the column error of {out}"
            )


def summary_path(out: Path) -> Path:
    """Path of a table's summary: `scores.summary.json` beside `scores.csv` or `scores/`."""
    named = out if out.name else out.absolute()  # "." has no name
    return named.parent / f"{named.stem}.summary.json"


def read_classes(out: Path) -> tuple[str, ...] | None:
    """The model's class names in their order, from the summary of a table.

    None if there is no summary, or if an older version wrote it without class names.
    """
    try:
        content = json.loads(summary_path(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    return tuple(classes) or None


def parse_error_limit(max_errors: str | None) -> Callable[[int], float] | None:
    """Function: number of images -> number of errors that `--max-errors` allows; None: no limit.

    Raises:
        OptionError: `max_errors` is neither a number nor a percentage.
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
