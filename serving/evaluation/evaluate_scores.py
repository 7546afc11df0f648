"""Compare a table of scores with true labels, without the model (`fledge evaluate-scores`).

A table of scores has one row for each image, with the predicted label and probability. The table is
read twice, as a stream:

    1. The paths go to a `TrueLabels` object.
    2. The rows and their true labels go to `StreamingMetrics`. The resulting figures are printed,
       and written as JSON and CSV if requested.

The first pass is needed because an image may be matched with a true label by its file name, and
only the complete table shows whether that file name is unique.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serving.errors import DataError, OptionError, WorkError
from serving.evaluation.streaming_metrics import BINS, ClassOrder, StreamingMetrics
from serving.evaluation.table_reader import read
from serving.evaluation.true_labels import FolderLabels, LabelFile, TrueLabels
from serving.scoring.row_writers import csv_line
from serving.scoring.summary import read_classes, summary_path
from serving.terminal import escape, show
from serving.utils.files import atomic_write, check_file
from serving.utils.label_names import LabelMatcher, nearest_labels, show_label

_CLASSES: Final = 20
"""Largest number of classes that are printed."""
_CONFUSIONS: Final = 10
"""Largest number of pairs of confused labels that are printed."""
_WIDEST_MATRIX: Final = 10_000
"""Largest number of labels in a confusion matrix. More distinct values are hardly class labels."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `fledge evaluate-scores`: the source of the true labels, and the output files.

    Attributes:
        labels_from_folders: Whether the true label is the name of the folder that contains the
            image.
        labels: CSV file of true labels; must be None if `labels_from_folders` is True.
        labels_column: Name of the column of `labels` that has the labels; None: "label".
        path_column: Name of the column of `labels` that has the paths; None: "path".
        bundle: Bundle from which the class names are read, in the order of the model's outputs.
            None: they are read from the summary file beside the table.
        json: Output file for all figures.
        confusion: Output CSV file for the confusion matrix, with one line for each true label.
        mistakes: Output CSV file for the wrong predictions, highest probability first, at most
            `streaming_metrics.MISTAKES` (1000).
        csv_safe: Whether an apostrophe is put before texts in CSV that a spreadsheet would take for
            formulas.
    """

    labels_from_folders: bool = False
    labels: Path | None = None
    labels_column: str | None = None
    path_column: str | None = None
    bundle: Path | None = None
    json: Path | None = None
    confusion: Path | None = None
    mistakes: Path | None = None
    csv_safe: bool = False


def evaluate(
    scores: Path, options: EvaluationOptions, *, log: Callable[[str], None] = show
) -> dict[str, Any]:
    """Compare a table of scores with true labels, and return all figures.

    The result is the content of the JSON output. The figures are also logged as text, and written
    to the output files in `options`.

    Args:
        scores: A `.csv`, `.jsonl` or `.parquet` file written by `fledge score`, or a folder of
            Parquet files written by it.
        options: Source of the true labels, and output files.
        log: Function that is called with each line of the printed result.

    Raises:
        OptionError: An option has an invalid value.
        DataError: The table or the labels can't be read, or no image of the table has a true label.
        BundleError: `options.bundle` is not a valid bundle.
        WorkError: Every row of the table is an error.
    """
    _check_outputs(scores, options)
    true_labels = _true_labels(options)
    order = _class_order(scores, options.bundle)
    example, predicted = "", dict[str, None]()
    for row in read(scores):
        true_labels.register(row.path)
        example = example or row.path
        if row.code is None:
            predicted[row.label] = None
        if options.bundle is None and row.code is None and row.label not in order.places:
            order = ClassOrder()  # there is no summary, or it belongs to another table
    known = order.places or predicted
    true_labels.set_classes(known)
    matcher, metrics = LabelMatcher(known), StreamingMetrics(order)
    for row in read(scores):
        truth = true_labels.label_of(row.path)
        metrics.add(row, None if truth is None else matcher.match(truth) or truth)
    if not metrics.rows:
        raise DataError(f"{scores}: there is no row in it; score some images first")
    if metrics.rows == metrics.errors.total():
        raise WorkError(
            f"{scores}: not one of {metrics.rows} rows has an answer: {_counts(metrics.errors)}"
        )
    if not metrics.confusion:
        reason = true_labels.no_match_message(example)
        raise DataError(f"{scores}: no answer has a true label; {reason}")
    _check_known(scores, metrics, by_folder=options.labels_from_folders)
    if options.confusion and len(_names(metrics)) > _WIDEST_MATRIX:
        raise OptionError(
            f"--confusion {options.confusion}: {len(_names(metrics))} labels are too many for a "
            "matrix; --json lists the pairs that occur"
        )
    figures = {"scores": str(scores)} | metrics.figures() | true_labels.match_counts()
    figures["respelled"] = matcher.respelled
    for line in describe(figures):
        log(escape(line))
    if not order.known:
        log(
            f"  class order unknown: {summary_path(scores)} is missing, or has no class names "
            "of this table; figures that need them are left out: add --bundle BUNDLE"
        )
    for path, lines in (
        (options.json, [json.dumps(figures, indent=2), "\n"]),
        (options.confusion, _matrix(metrics, options.csv_safe)),
        (options.mistakes, _mistakes(metrics, options.csv_safe)),
    ):
        if path is not None:
            _write(path, lines)
            log(f"wrote {path}")
    return figures


def describe(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures returned by `evaluate` as lines of text."""
    rows, answers, evaluated = (figures[name] for name in ("rows", "answers", "evaluated"))
    yield f"{figures['scores']}: {_rows(rows)}, {answers} with an answer, {evaluated} evaluated"
    named = {
        "accuracy": _accuracy(figures),
        "top-5": [] if figures["top_5"] is None else [f"{figures['top_5']:.1%}"],
        "log loss": _log_loss(figures),
        "calibration": [
            f"expected error {figures['calibration']['error']:.1%}, over "
            f"{_rows(figures['calibration']['rows'])} in {BINS} bins"
        ],
        "confident": _confident(figures["confident"]),
        "labels": _labels(figures),
        "errors": [_counts(figures["errors"])] if figures["errors"] else [],
        "by class": _table(
            [
                (
                    _shown(item["label"]),
                    f"{item['accuracy']:7.1%}  {item['right']} of {item['rows']}",
                )
                for item in figures["classes"]
            ],
            _CLASSES,
        ),
        "confused": _table(
            [
                (f"{_shown(item['label'])} -> {_shown(item['said'])}", f"{item['rows']:7}")
                for item in figures["confusion"]
                if item["label"] != item["said"]
            ],
            _CONFUSIONS,
        ),
    }
    for name, lines in named.items():
        for number, line in enumerate(lines):
            yield f"  {'' if number else name:<13}{line}"


def _accuracy(figures: Mapping[str, Any]) -> list[str]:
    def text(found: Mapping[str, Any]) -> str:
        low, high = found["interval"]
        return (
            f"{found['value']:.1%}, {found['right']} of {found['rows']} right; "
            f"95% interval {low:.1%} to {high:.1%}"
        )

    plain, strict = figures["accuracy"], figures["accuracy_errors_as_wrong"]
    more = [] if strict["rows"] == plain["rows"] else [f"{text(strict)}, counting errors as wrong"]
    return [text(plain), *more]


def _log_loss(figures: Mapping[str, Any]) -> list[str]:
    loss, evaluated = figures["log_loss"], figures["evaluated"]
    if loss is None:
        return []
    lines = [f"{'at least ' if loss['at_least'] else ''}{loss['value']:.4f}"]
    if loss["rows"] < evaluated:
        lines[0] += f", over {_rows(loss['rows'])} whose true label the model has"
    if loss["at_least"]:
        lines.append(
            f"only a bound is known for {_rows(loss['bounded_rows'])}; `fledge score "
            "--probabilities` makes it exact"
        )
    return lines


def _confident(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    right = "" if found["precision"] is None else f", {found['precision']:.1%} of these right"
    return [f"{found['rows']} of {found['of']} answers, {found['coverage']:.1%}{right}"]


def _labels(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    if figures["without_label"]:
        lines.append(
            f"{_rows(figures['without_label'])} with an answer and no true label, left out"
        )
    if figures["by_file_name"]:
        lines.append(f"{_rows(figures['by_file_name'])} found by the name of the file alone")
    if figures["by_path_end"]:
        lines.append(
            f"{_rows(figures['by_path_end'])} found by the end of the path: its folders and the "
            "name of the file"
        )
    if figures["ambiguous_file_name"]:
        lines.append(
            f"{_rows(figures['ambiguous_file_name'])} without a true label, as several files "
            "have that name; write the paths as in the table"
        )
    for name, label in list(figures["respelled"].items())[:_CONFUSIONS]:
        lines.append(f"{show_label(name)} is taken for {show_label(label)}")
    if figures["unknown_labels"]:
        known = "the model's classes" if figures["unknown_to"] == "model" else "the answers"
        unknown = _counts(figures["unknown_labels"])
        lines.append(f"not among {known}, and counted as wrong: {unknown}")
    return lines


def _table(rows: list[tuple[str, str]], most: int) -> list[str]:
    shown = rows[:most]
    width = max((len(name) for name, _ in shown), default=0)
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return [f"{name:<{width}} {text}" for name, text in shown] + more


def _counts(counts: Mapping[str, int], most: int = 10) -> str:
    shown = [f"{_shown(name)} {count}" for name, count in list(counts.items())[:most]]
    return ", ".join(shown + [f"and {len(counts) - most} more"] * (len(counts) > most))


def _rows(number: int) -> str:
    return f"{number} row" if number == 1 else f"{number} rows"


def _shown(label: str) -> str:
    return label if label.isprintable() else repr(label)


def _check_known(scores: Path, metrics: StreamingMetrics, *, by_folder: bool) -> None:
    """Check that the model has one of the true labels, or that one is among the answers.

    Raises:
        DataError: None is. The message has the nearest labels.
    """
    truths = Counter[str]()
    for (truth, _), rows in metrics.confusion.items():
        truths[truth] += rows
    known = metrics.order.places or metrics.named
    if any(truth in known for truth in truths):
        return
    what = "a class of the model" if metrics.order.known else "among the answers"
    first = next(iter(dict(truths.most_common(1))))
    near = [show_label(label) for label in nearest_labels(first, known)]
    have = [show_label(label) for label in list(known)[:_CONFUSIONS]]
    listed = (
        f"the nearest to {show_label(first)}: {', '.join(near)}"
        if near
        else (f"the labels are {', '.join(have)}{' and more' if len(known) > len(have) else ''}")
    )
    remedy = "" if metrics.order.known else "; if these are classes, add --bundle BUNDLE"
    if by_folder and not near:
        remedy += (
            "; if the folders are no classes, give a table of path and label, such as the "
            "split.csv of the run, with --labels TABLE instead of --labels-from-folders"
        )
    raise DataError(
        f"{scores}: no true label is {what}: {_counts(dict(truths.most_common()))}; "
        f"{listed}{remedy}"
    )


def _check_outputs(scores: Path, options: EvaluationOptions) -> None:
    used = {scores.resolve(): "the table"}
    if options.labels is not None:
        used[options.labels.resolve()] = "--labels"
    for name in ("json", "confusion", "mistakes"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        check_file(path, f"--{name}")
        if path.resolve() in used:
            raise OptionError(f"--{name} {path}: that is {used[path.resolve()]}; name another")
        used[path.resolve()] = f"--{name}"


def _true_labels(options: EvaluationOptions) -> TrueLabels:
    columns = {"--labels-column": options.labels_column, "--path-column": options.path_column}
    if (options.labels is None) != options.labels_from_folders:
        raise OptionError(
            "the true labels are missing: give either --labels FILE, a CSV with the columns path "
            "and label, or --labels-from-folders"
        )
    if options.labels is not None:
        return LabelFile(options.labels, *columns.values())
    for option, name in columns.items():
        if name is not None:
            raise OptionError(f"{option} {name}: goes with --labels FILE; leave it out")
    return FolderLabels()


def _class_order(scores: Path, bundle: Path | None) -> ClassOrder:
    """Return the class names of the bundle, or else of the summary file beside the table.

    If there is neither, the result is an empty `ClassOrder`.
    """
    if bundle is not None:
        from serving.bundle import storage  # pydantic takes 0.2 s to import

        return ClassOrder(storage.read(bundle).manifest.labels, f"--bundle {bundle}")
    return ClassOrder(read_classes(scores), str(summary_path(scores)))


def _names(metrics: StreamingMetrics) -> list[str]:
    return sorted({label for pair in metrics.confusion for label in pair})


def _matrix(metrics: StreamingMetrics, safe: bool) -> Iterator[str]:
    names = _names(metrics)
    yield csv_line(["label", *names], safe=safe)
    for label in names:
        counts = (metrics.confusion[label, said] for said in names)
        yield csv_line([label, *counts], safe=safe)


def _mistakes(metrics: StreamingMetrics, safe: bool) -> Iterator[str]:
    yield csv_line(["path", "truth", "label", "probability"])
    for probability, _, path, truth, label in sorted(metrics.mistakes, reverse=True):
        yield csv_line([path, truth, label, probability], safe=safe)


def _write(path: Path, lines: Iterable[str]) -> None:
    with (
        atomic_write(path) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.writelines(lines)
