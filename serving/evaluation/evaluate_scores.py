"""`fledge evaluate-scores`: a table of scores against true labels. Needs no model and no torch.

    scores.read --paths--> TrueLabels, Order                    the first time through the table
    scores.read --rows---> Tally --figures--> words, JSON, CSV  the second time

A file's name can be trusted, and a label's place be known, when all rows were seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serving.errors import DataError, OptionError, WorkError
from serving.evaluation.score_table import read
from serving.evaluation.streaming_metrics import BINS, ClassOrder, StreamingMetrics
from serving.evaluation.true_labels import FolderLabels, LabelFile, TrueLabels
from serving.scoring.table import csv_line
from serving.utils.files import check_file, write_aside

_CLASSES: Final = 20
_CONFUSIONS: Final = 10
_WIDEST: Final = 10_000
"""Labels of a confusion matrix that is written; more of them are no labels."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is compared with what, and what is written.

    labels_from_folders: the name of the folder that an image lies in is its true label; else
    labels: a CSV file of them, with
    labels_column, path_column: "label" and "path" unless they are called otherwise.
    bundle: tells the model's labels in order; without it they are learnt from the table.
    json: takes all figures.
    confusion: takes the confusion matrix as CSV, a row for each true label.
    mistakes: takes the wrong answers as CSV, the surest first, at most `tally.MISTAKES`.
    """

    labels_from_folders: bool = False
    labels: Path | None = None
    labels_column: str | None = None
    path_column: str | None = None
    bundle: Path | None = None
    json: Path | None = None
    confusion: Path | None = None
    mistakes: Path | None = None


def evaluate(
    scores: Path, options: EvaluationOptions, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Tell how good a table of scores is, and return the figures as JSON has them.

    Args:
        scores: A `.csv`, `.jsonl` or `.parquet` file of `fledge score`, or its folder of them.
        options: As `Options`.
        say: Takes what is to be told to people.

    Raises:
        OptionError: An option that can't be used.
        DataError: A table or labels that can't be read, or that have nothing in common.
        BundleError: No usable bundle.
        WorkError: Not one row has an answer.
    """
    _check_outputs(scores, options)
    truths = _truths(options)
    order = ClassOrder(_labels_of(options.bundle))
    example = ""
    for answer in read(scores):
        truths.meet(answer.path)
        order.learn(answer)
        example = example or answer.path
    tally = StreamingMetrics(order)
    for answer in read(scores):
        tally.add(answer, truths.of(answer.path))
    if not tally.rows:
        raise DataError(f"{scores}: there is no row in it; score some images first")
    if tally.rows == tally.errors.total():
        raise WorkError(
            f"{scores}: not one of {tally.rows} rows has an answer: {_counts(tally.errors)}"
        )
    if not tally.confusion:
        raise DataError(f"{scores}: no answer has a true label; {truths.why_none(example)}")
    if options.confusion and len(_names(tally)) > _WIDEST:
        raise OptionError(
            f"--confusion {options.confusion}: {len(_names(tally))} labels are too many for a "
            "matrix; --json lists the pairs that occur"
        )
    figures = {"scores": str(scores)} | tally.figures() | truths.notes()
    for line in describe(figures):
        say(line.encode("utf-8", "backslashreplace").decode())  # a path may be no UTF-8
    for path, lines in (
        (options.json, [json.dumps(figures, indent=2), "\n"]),
        (options.confusion, _matrix(tally)),
        (options.mistakes, _mistakes(tally)),
    ):
        if path is not None:
            _write(path, lines)
            say(f"wrote {path}")
    return figures


def describe(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures for a person: lines of a name and what it has to say."""
    rows, answers, evaluated = (figures[name] for name in ("rows", "answers", "evaluated"))
    yield f"{figures['scores']}: {_rows(rows)}, {answers} with an answer, {evaluated} judged"
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
    for name, said in named.items():
        for number, line in enumerate(said):
            yield f"  {'' if number else name:<13}{line}"


def _accuracy(figures: Mapping[str, Any]) -> list[str]:
    def told(found: Mapping[str, Any]) -> str:
        low, high = found["interval"]
        return (
            f"{found['value']:.1%}, {found['right']} of {found['rows']} right; "
            f"95% interval {low:.1%} to {high:.1%}"
        )

    plain, strict = figures["accuracy"], figures["accuracy_errors_as_wrong"]
    more = [] if strict["rows"] == plain["rows"] else [f"{told(strict)}, counting errors as wrong"]
    return [told(plain), *more]


def _log_loss(figures: Mapping[str, Any]) -> list[str]:
    loss, evaluated = figures["log_loss"], figures["evaluated"]
    if loss is None:
        return []
    lines = [f"{'at least ' if loss['at_least'] else ''}{loss['value']:.4f}"]
    if loss["rows"] < evaluated:
        lines[0] += f", over {_rows(loss['rows'])} whose true label the model has"
    if loss["at_least"]:
        lines.append(
            f"of {_rows(loss['bounded_rows'])} only a bound is known; `fledge score "
            "--probabilities`, and --bundle here, tell it exactly"
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
    if figures["ambiguous_file_name"]:
        lines.append(
            f"{_rows(figures['ambiguous_file_name'])} not found by it, as several files have that "
            "name; write the paths as in the table"
        )
    if figures["unknown_labels"]:
        who = "the model has" if figures["unknown_to"] == "model" else "answers name"
        unknown = _counts(figures["unknown_labels"])
        lines.append(f"not among those that {who}, and counted as wrong: {unknown}")
    return lines


def _table(rows: list[tuple[str, str]], most: int) -> list[str]:
    shown = rows[:most]
    width = max((len(name) for name, _ in shown), default=0)
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return [f"{name:<{width}} {said}" for name, said in shown] + more


def _counts(counts: Mapping[str, int], most: int = 10) -> str:
    shown = [f"{_shown(name)} {count}" for name, count in list(counts.items())[:most]]
    return ", ".join(shown + [f"and {len(counts) - most} more"] * (len(counts) > most))


def _rows(number: int) -> str:
    return f"{number} row" if number == 1 else f"{number} rows"


def _shown(label: str) -> str:
    return label if label.isprintable() else repr(label)


def _check_outputs(scores: Path, options: EvaluationOptions) -> None:
    taken = {scores.resolve(): "the table"}
    if options.labels is not None:
        taken[options.labels.resolve()] = "--labels"
    for name in ("json", "confusion", "mistakes"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        check_file(path, f"--{name}")
        if path.resolve() in taken:
            raise OptionError(f"--{name} {path}: that is {taken[path.resolve()]}; name another")
        taken[path.resolve()] = f"--{name}"


def _truths(options: EvaluationOptions) -> TrueLabels:
    columns = {"--labels-column": options.labels_column, "--path-column": options.path_column}
    if (options.labels is None) != options.labels_from_folders:
        raise OptionError(
            "say where the true labels are: either --labels FILE, a CSV with the columns path and "
            "label, or --labels-from-folders"
        )
    if options.labels is not None:
        return LabelFile(options.labels, *columns.values())
    for option, name in columns.items():
        if name is not None:
            raise OptionError(f"{option} {name}: goes with --labels FILE; leave it out")
    return FolderLabels()


def _labels_of(bundle: Path | None) -> tuple[str, ...] | None:
    if bundle is None:
        return None
    from serving.bundle import storage as bundles

    return bundles.read(bundle).manifest.labels


def _names(tally: StreamingMetrics) -> list[str]:
    return sorted({label for pair in tally.confusion for label in pair})


def _matrix(tally: StreamingMetrics) -> Iterator[str]:
    names = _names(tally)
    yield csv_line(["label", *names])
    for label in names:
        yield csv_line([label, *(tally.confusion[label, said] for said in names)])


def _mistakes(tally: StreamingMetrics) -> Iterator[str]:
    yield csv_line(["path", "truth", "label", "probability"])
    for probability, _, path, truth, label in sorted(tally.mistakes, reverse=True):
        yield csv_line([path, truth, label, probability])


def _write(path: Path, lines: Iterable[str]) -> None:
    with (
        write_aside(path) as aside,
        aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.writelines(lines)
