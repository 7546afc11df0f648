"""Compare the values of `Preprocess.fit` (crop, squish, pad) on the held-out photos of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import OptionError
from serving.imaging.preprocess import FITS
from serving.terminal import quote, quote_path
from training.data.dataset import SPLIT_FILE
from training.evaluation import metrics
from training.evaluation.evaluate import EvaluationResult, evaluate
from training.run import checkpoint


@dataclass(frozen=True, eq=False)
class FitResult:
    """A run's answers with one value of `Preprocess.fit`.

    Attributes:
        fit: The value.
        result: The answers and their metrics.
        gain: Accuracy minus that with the fit of training, on the photos that both have, from -1
            to 1.
        interval: 95 % confidence interval of `gain`.
    """

    fit: str
    result: EvaluationResult
    gain: float
    interval: tuple[float, float]


def parse(text: str) -> list[str]:
    """Return the values of `--fit`, such as "crop,pad", each once.

    Raises:
        OptionError: A value is none of `FITS`.
    """
    fits = list(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    for fit in fits:
        if fit not in FITS:
            raise OptionError(f"--fit {quote(text)}: use one or more of {','.join(FITS)}")
    return fits


def compare(run: Path, fits: Sequence[str], **options: Any) -> list[FitResult]:
    """Evaluate a run with several fits; the first result is that with the fit of training.

    Args:
        run: Run folder or checkpoint file.
        fits: Values of `Preprocess.fit`; that of training is added if it is not among them.
        options: Arguments of `evaluate`.

    Raises:
        DataError: As `evaluate`.
        OptionError: As `evaluate`.
    """
    trained = _info(run).preprocess.fit
    base = evaluate(run, fit=trained, **options)
    found = [_compared(trained, base, base)]
    for fit in fits:
        if fit != trained:
            found.append(_compared(fit, evaluate(run, fit=fit, **options), base))
    return found


def _compared(fit: str, result: EvaluationResult, base: EvaluationResult) -> FitResult:
    first, second = _right(base), _right(result)
    both = first.keys() & second.keys()  # a photo may have changed in between
    lost = sum(first[path] and not second[path] for path in both)
    won = sum(second[path] and not first[path] for path in both)
    # The interval is that of a drop; that of a gain is the same with the two swapped.
    low, high = metrics.paired_interval(won, lost, len(both))
    return FitResult(fit, result, (won - lost) / max(len(both), 1), (low, high))


def _right(result: EvaluationResult) -> dict[Path, bool]:
    right = result.probabilities.argmax(axis=1) == result.labels
    return dict(zip(result.paths, np.asarray(right).tolist(), strict=True))


def table(found: Sequence[FitResult]) -> Iterator[str]:
    """Yield the lines of a table: accuracy, loss, and the difference to the fit of training."""
    yield f"{'fit':<8}{'accuracy':>8}  {'loss':>9}  difference in points, 95 % interval"
    for i, one in enumerate(found):
        low, high = (100 * end for end in one.interval)
        difference = (
            f"{100 * one.gain:+.2f} ({low:+.2f} to {high:+.2f})" if i else "trained with it"
        )
        yield f"{one.fit:<8}{one.result.accuracy:.6f}  {one.result.loss:9.6f}  {difference}"
    result = found[0].result
    yield f"photos {result.photos}  views {result.views}  broken {result.broken}"


def advice(found: Sequence[FitResult], run: Path, data: Path | None = None) -> str:
    """Return a line that says what the table can't tell, and the command that can; or "".

    Args:
        found: Result of `compare`.
        run: The run.
        data: Where the photos are; None: where they were in training.
    """
    others = found[1:]
    if not others:
        return ""
    best = max(others, key=lambda one: (one.result.accuracy, -one.result.loss)).fit
    trained, folder = found[0].fit, checkpoint.run_folder_of(run)
    source = data or _info(run).data.get("source", "DATA")
    return (
        f"the network was trained with preprocess.fit={trained}, which favours {trained}; for a "
        f"fair comparison train with {best}, too: "
        f"`fledge train {quote_path(folder / 'recipe.toml')} --data {quote_path(source)} --split "
        f"{quote_path(folder / SPLIT_FILE)} preprocess.fit={best}`"
    )


def _info(run: Path) -> checkpoint.CheckpointInfo:
    return checkpoint.read_info(checkpoint.weights_path(run).with_suffix(".json"))
