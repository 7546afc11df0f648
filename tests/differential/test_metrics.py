"""The metrics against scikit-learn and SciPy, on random and degenerate tables.

Known differences, which the tests account for:

- Among equal probabilities, the class of the smaller index comes first; scikit-learn's
  `top_k_accuracy_score` takes the larger one. Tables with ties are compared by another computation.
- The log loss bounds probabilities from below by 1e-12; scikit-learn by the float's epsilon.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from serving.evaluation.evaluate_scores import EvaluationOptions, evaluate
from serving.evaluation.streaming_metrics import BINS, interval
from serving.scoring.row_writers import csv_line
from serving.scoring.rows import COLUMNS, PROBABILITIES, ScoreRow
from serving.scoring.table import TableFile
from tests.support.hypothesis_profiles import examples
from training.evaluation import metrics

Table = tuple[metrics.Probabilities, metrics.Labels]

SMALLEST = metrics.SMALLEST
EPSILON = np.finfo(np.float64).eps


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Probabilities and labels: smooth, certain, with ties, and with classes that never occur."""
    photos, classes = draw(st.integers(1, 60)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.integers(0, draw(st.integers(1, classes)), photos)
    match draw(st.sampled_from(["smooth", "certain", "tied", "equal", "right", "zeros"])):
        case "smooth":
            rows = rng.dirichlet(np.ones(classes), photos)
        case "certain":
            rows = np.eye(classes)[rng.integers(0, classes, photos)]
        case "tied":
            rows = rng.integers(1, 4, (photos, classes)).astype(float)
        case "equal":
            rows = np.ones((photos, classes))
        case "right":
            rows = np.eye(classes)[labels] + 0.01
        case _:
            rows = rng.dirichlet(np.ones(classes), photos) * rng.integers(0, 2, (photos, classes))
            rows[:, 0] += 1e-3
    return rows / rows.sum(axis=1, keepdims=True), labels


def has_ties(probabilities: metrics.Probabilities) -> bool:
    return bool((np.diff(np.sort(probabilities, axis=1), axis=1) == 0).any())


def log_loss(probabilities: metrics.Probabilities, labels: metrics.Labels) -> float:
    """scikit-learn's log loss, with the lower bound of ours."""
    classes = np.arange(probabilities.shape[1])
    theirs = reference.log_loss(labels, probabilities, labels=classes)
    true = np.maximum(probabilities[np.arange(len(labels)), labels], EPSILON)
    return theirs + float(np.log(np.minimum(true / SMALLEST, 1)).mean())


def top_k(probabilities: metrics.Probabilities, labels: metrics.Labels, k: int) -> float:
    classes = np.arange(probabilities.shape[1])
    if has_ties(probabilities) or len(classes) == 2:
        before = [
            sum((p > row[label]) or (p == row[label] and i < label) for i, p in enumerate(row))
            for row, label in zip(probabilities, labels, strict=True)
        ]
        return float(np.mean([count < k for count in before]))
    if k >= len(classes):
        return 1.0
    return float(reference.top_k_accuracy_score(labels, probabilities, k=k, labels=classes))


@given(tables(), st.integers(1, 9))
@examples(60)
def test_the_metrics_of_training_equal_those_of_sklearn(table, k) -> None:
    probabilities, labels = table
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(axis=1)
    assert metrics.accuracy(*table) == reference.accuracy_score(labels, predicted)
    assert metrics.top_k(*table, k) == pytest.approx(top_k(*table, k))
    assert metrics.log_loss(*table) == pytest.approx(log_loss(*table), rel=1e-9, abs=1e-9)
    matrix = metrics.confusion(predicted, labels, len(classes))
    assert (matrix == reference.confusion_matrix(labels, predicted, labels=classes)).all()
    found = metrics.per_class(matrix)
    expected = reference.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert ours == pytest.approx(theirs, nan_ok=True), name
    confidence, right = probabilities.max(axis=1), (predicted == labels).astype(int)
    curve = metrics.calibration(*table)
    true, mean = calibration_curve(right, confidence, n_bins=10, pos_label=1)
    full = curve.photos > 0
    assert curve.accuracy[full] == pytest.approx(true)
    assert curve.confidence[full] == pytest.approx(mean)
    errors = curve.photos[full] * np.abs(true - mean)
    assert curve.ece == pytest.approx(errors.sum() / len(labels), abs=1e-12)


def write(folder: Path, table: Table, names: list[str], probabilities: bool) -> Path:
    """A table of scores as `fledge score` writes it, and `labels.csv` with the true labels."""
    out, lines = folder / "scores.csv", [csv_line(["path", "label"])]
    columns = [*COLUMNS, PROBABILITIES] if probabilities else COLUMNS
    with TableFile(out, columns) as file:
        for number, (row, label) in enumerate(zip(*table, strict=True)):
            order = np.argsort(-row, kind="stable")
            top = tuple((names[i], float(row[i])) for i in order)
            path = f"{number}.jpg"
            file.append(
                [ScoreRow(path, "ok", *top[0], None, top, 1, probabilities=tuple(map(float, row)))]
            )
            lines.append(csv_line([path, names[label]]))
    (folder / "scores.summary.json").write_text(json.dumps({"classes": names}))
    (folder / "labels.csv").write_text("".join(lines))
    return out


@given(tables(), st.booleans())
@examples(40)
def test_the_metrics_of_a_table_of_scores_equal_those_of_sklearn(table, with_all) -> None:
    probabilities, labels = table
    names = [f"class {number}" for number in range(probabilities.shape[1])]
    with tempfile.TemporaryDirectory() as folder:
        out = write(Path(folder), table, names, with_all)
        options = EvaluationOptions(labels=Path(folder, "labels.csv"))
        found = evaluate(out, options, log=lambda line: None)
    predicted = probabilities.argmax(axis=1)
    right = predicted == labels
    assert found["accuracy"]["value"] == reference.accuracy_score(labels, predicted)
    assert found["log_loss"]["value"] == pytest.approx(log_loss(*table), rel=1e-9, abs=1e-9)
    assert not found["log_loss"]["at_least"]
    if len(names) > 5:
        assert found["top_5"] == pytest.approx(top_k(*table, 5))
    confidence = probabilities.max(axis=1)
    error = calibration_error(confidence, right)
    assert found["calibration"]["error"] == pytest.approx(error, abs=1e-9)
    matrix = reference.confusion_matrix(labels, predicted, labels=range(len(names)))
    pairs = {(one["label"], one["said"]): one["rows"] for one in found["confusion"]}
    assert pairs == {(names[i], names[j]): matrix[i, j] for i, j in np.argwhere(matrix)}
    recall = reference.recall_score(
        labels, predicted, labels=range(len(names)), average=None, zero_division=np.nan
    )
    ours = {one["label"]: one["accuracy"] for one in found["classes"]}
    assert ours == {
        name: share for name, share in zip(names, recall, strict=True) if not np.isnan(share)
    }


def calibration_error(confidence: metrics.Floats, right: metrics.Labels) -> float:
    true, mean = calibration_curve(right.astype(int), confidence, n_bins=BINS, pos_label=1)
    edges = np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(place, minlength=BINS)
    return float((np.abs(true - mean) * counts[counts > 0]).sum() / len(right))


@given(st.integers(1, 5000), st.data())
@examples(100)
def test_the_interval_equals_that_of_scipy(rows, data) -> None:
    right = data.draw(st.integers(0, rows))
    expected = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    assert interval(right, rows) == pytest.approx((expected.low, expected.high), abs=1e-7)
