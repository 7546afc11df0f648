"""Export at another input size (`--size`), and compare several for the choice (`--sizes`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from export.input_size import table
from export.input_size.compare import SizeComparison, compare
from export.precision.select import check_request
from export.precision.verdict import DEFAULT_BUDGET
from export.sources.source import Source, check_finite, read_run
from serving.errors import GateError
from serving.terminal import show


def compare_sizes(
    run: Path,
    sizes: Sequence[int],
    *,
    budget: float = DEFAULT_BUDGET,
    data: Path | None = None,
    photos: Path | None = None,
    folds: Sequence[Path] = (),
    log: Callable[[str], None] = show,
) -> SizeComparison:
    """Compare the accuracy and speed of a run's best checkpoint at several input sizes.

    Args:
        run: The run's folder, or one of its checkpoint files.
        sizes: Sides of the input in pixels. That of the training is added.
        budget: Percentage points of accuracy that another size may lose.
        data: The photos' folder, if they were moved after training.
        photos: Folder of further held-out photos, with one folder per class.
        folds: Runs of the other folds of the same data.
        log: Function that is called with lines about the photos.

    Raises:
        DataError: There is no checkpoint, or the photos are missing.
        OptionError: The budget is not from 0 to 100, or the network does not take a size.
        WorkError: Weights are not finite, or the network can't be exported.
    """
    check_request("fp32", budget)
    source = read_run(run, sizes, "--sizes", data=data, photos=photos, folds_of=folds, log=log)
    check_finite(source.classifier, run)
    return compare(source, sizes, budget)


def resize(source: Source, size: int, budget: float, log: Callable[[str], None]) -> Source:
    """Return the source with another input size, unless this surely costs too much accuracy.

    Args:
        source: The network, with photos.
        size: Side of the input in pixels.
        budget: Percentage points of accuracy that another size may lose.
        log: Function that is called with one line about the result.

    Raises:
        GateError: Accuracy surely falls by more than the budget.
        DataError: There are no held-out photos that can be decoded.
        WorkError: The network can't be exported.
    """
    if size == source.info.preprocess.size:
        log(f"size {size} is the trained size")
        return source
    found = compare(source, [size], budget)
    log(table.summary(found, size))
    if reason := found.refusal_reason(found.at(size)):
        raise GateError(
            f"--size {size} is refused: {reason}; no bundle was written, and --sizes compares sizes"
        )
    info = replace(source.info, preprocess=replace(source.info.preprocess, size=size))
    return source._replace(info=info, size_report=table.report(found, size))
