"""Summary of a scoring run: lines to print, and a JSON file beside the table.

The summary also determines whether the run fails because too few images could be scored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import DataError, GateError, OptionError, WorkError
from serving.inputs.passed_over import PassedOver
from serving.terminal import escape
from serving.utils import json_reader
from serving.utils.files import atomic_write
from serving.utils.regular_files import read_limited

if TYPE_CHECKING:  # `fledge evaluate-scores` reads summaries and needs no model
    from serving.inference.predictor import Predictor


@dataclass(frozen=True)
class Summary:
    """Counts and duration of a scoring run.

    Attributes:
        images: Number of rows in the table.
        scored: Number of rows without an error.
        errors: Number of rows for each error code, most frequent first.
        labels: Number of rows for each predicted label, most frequent first.
        seconds: Duration of this run in seconds, without loading the model.
        now: Number of images scored in this run, without those of earlier interrupted runs.
        skipped: Number of folders, archives and lists that could not be read completely.
        passed_over: Counts of files and folders in the inputs that are no images or were passed
            over for another reason.
    """

    images: int
    scored: int
    errors: Mapping[str, int]
    labels: Mapping[str, int]
    seconds: float
    now: int
    skipped: int = 0
    passed_over: PassedOver = field(default_factory=PassedOver)

    def __str__(self) -> str:
        """Return the lines to print."""
        rate = self.now / max(self.seconds, 1e-9)
        lines = [f"{self.now} images in {self.seconds:.1f} s, {rate:.0f} images/s"]
        lines.append(f"scored: {self.scored}{_counts(self.labels)}")
        if self.errors:
            lines.append(f"errors: {self.images - self.scored}{_counts(self.errors)}")
        if self.skipped:
            lines.append(f"skipped: {self.skipped} (could not be read)")
        if self.passed_over:
            lines.append(self.passed_over.line())
        return "\n".join(lines)

    def write(self, out: Path, predictor: Predictor, *, csv_safe: bool = False) -> None:
        """Write the summary file of the table `out`.

        The file also has the model's class names, in the order of the model's outputs, and whether
        texts in the table are escaped for spreadsheets (`csv_safe`).

        Raises:
            WorkError: The file can't be written.
        """
        content = {
            "model": predictor.model,
            "precision": predictor.precision,
            **asdict(self),
            "passed_over": self.passed_over.totals(),
            "classes": list(predictor.manifest.labels),
        } | ({"csv_safe": True} if csv_safe else {})
        path = summary_path(out)
        try:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise WorkError(f"{path}: {error.strerror or error}") from error

    def check(self, out: Path, max_errors: str | None) -> None:
        """Raise an error if too few images were scored. The table is complete in any case.

        Args:
            out: Path of the table, for the error message.
            max_errors: Allowed number ("N") or percentage ("P%") of images with an error; None: no
                limit.

        Raises:
            DataError: There were no images.
            WorkError: No image could be scored.
            GateError: More images than `max_errors` allows could not be scored.
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
    """Return the path of a table's summary file: `a.summary.json` beside `a.csv` or `a/`."""
    named = out if out.name else out.absolute()  # "." has no name
    return named.parent / f"{named.stem}.summary.json"


def read_classes(out: Path) -> tuple[str, ...] | None:
    """Return the model's class names from the summary file of a table, in the order of the outputs.

    Args:
        out: Path of the table.

    Returns:
        None if there is no summary file, or if the file has no class names.
    """
    content = _read(out)
    classes = None if content is None else content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    return tuple(classes) or None


def read_csv_safe(out: Path) -> bool:
    """Return whether texts in a table may be escaped for spreadsheets: unknown without a summary.

    Args:
        out: Path of the table.
    """
    content = _read(out)
    return content is None or content.get("csv_safe") is True


def _read(out: Path) -> dict[str, Any] | None:
    try:
        content = json_reader.parse(read_limited(summary_path(out), json_reader.MAX_BYTES))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def parse_error_limit(max_errors: str | None) -> Callable[[int], float] | None:
    """Return a function: number of images -> number of images that may have an error.

    Args:
        max_errors: Value of `--max-errors`: a number such as "5", or a percentage such as "5%".

    Returns:
        None if `max_errors` is None, which means no limit.

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
    shown = [f"{escape(name)} {count}" for name, count in list(counts.items())[:most]]
    if len(counts) > most:
        shown.append(f"and {len(counts) - most} more")
    return f" ({', '.join(shown)})" if shown else ""
