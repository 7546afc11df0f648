"""Metrics compared with scikit-learn, and edge cases that it does not cover."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from training.evaluation import metrics


@pytest.fixture(params=[(200, 5, 0), (30, 12, 1), (7, 2, 2)], ids=str)
def answers(request):
    photos, classes, seed = request.param
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, photos)
    probabilities = rng.dirichlet(np.ones(classes), photos)
    probabilities[np.arange(photos), labels] += rng.random(photos)
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def test_the_metrics_equal_those_of_sklearn(answers):
    probabilities, labels = answers
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(axis=1)
    assert metrics.accuracy(*answers) == reference.accuracy_score(labels, predicted)
    expected = reference.log_loss(labels, probabilities, labels=classes)
    assert metrics.log_loss(*answers) == pytest.approx(expected, rel=1e-12)
    matrix = metrics.confusion(predicted, labels, len(classes))
    expected = reference.confusion_matrix(labels, predicted, labels=classes)
    assert (matrix == expected).all()
    found = metrics.per_class(matrix)
    expected = reference.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert np.allclose(ours, theirs, equal_nan=True)
    for k in range(1, len(classes)) if len(classes) > 2 else ():
        expected = reference.top_k_accuracy_score(labels, probabilities, k=k, labels=classes)
        assert metrics.top_k(*answers, k) == pytest.approx(expected)
    assert metrics.top_k(*answers, len(classes)) == 1


def test_recall_without_photos_and_precision_without_predictions_are_nan():
    matrix = metrics.confusion(np.array([0, 0, 1]), np.array([0, 2, 1]), 4)
    found = metrics.per_class(matrix)
    assert np.isnan(found.recall).tolist() == [False, False, False, True]
    assert np.isnan(found.precision).tolist() == [False, False, True, True]
    assert found.f1[:3].tolist() == [2 / 3, 1, 0]
    assert np.isnan(found.f1[3])
    assert found.support.tolist() == [1, 1, 1, 0]


def test_metrics_of_a_single_photo_are_defined():
    probabilities, labels = np.array([[0.25, 0.75]]), np.array([1])
    assert metrics.accuracy(probabilities, labels) == 1
    assert metrics.log_loss(probabilities, labels) == pytest.approx(-math.log(0.75))
    assert metrics.most_confused(metrics.confusion(labels, labels, 2), 5) == []
    assert metrics.calibration(probabilities, labels).ece == pytest.approx(0.25)
    assert metrics.unsure(probabilities, labels, 3).tolist() == [0]
    assert metrics.unsure(probabilities, np.array([0]), 3).tolist() == []
    assert math.isfinite(metrics.log_loss(np.array([[0.0, 1.0]]), np.array([0])))


def test_the_pairs_confused_most_come_first():
    matrix = np.array([[5, 1, 0], [3, 9, 1], [0, 0, 4]])
    assert metrics.most_confused(matrix, 9) == [(1, 0, 3), (0, 1, 1), (1, 2, 1)]
    assert metrics.most_confused(matrix, 1) == [(1, 0, 3)]


def test_calibration_is_a_weighted_mean_over_its_bins(answers):
    probabilities, labels = answers
    found = metrics.calibration(probabilities, labels, bins=10)
    assert found.photos.sum() == len(labels)
    full = found.photos > 0
    gaps = np.abs(found.accuracy - found.confidence)[full]
    assert found.ece == pytest.approx((gaps * found.photos[full]).sum() / len(labels))
    inside = (found.edges[:-1] <= found.confidence) & (found.confidence <= found.edges[1:])
    assert inside[full].all()
    # A bin excludes its lower bound and includes its upper one.
    edge = metrics.calibration(np.array([[0.5, 0.5], [0.4, 0.6]]), np.array([0, 1]), bins=2)
    assert edge.photos.tolist() == [1, 1]


def test_confidence_equal_to_accuracy_has_no_calibration_error():
    labels = np.array([0] * 8 + [1] * 2)
    calibrated = np.tile([0.8, 0.2], (10, 1))
    assert metrics.calibration(calibrated, labels).ece == pytest.approx(0, abs=1e-12)
    overconfident = np.tile([1.0, 0.0], (10, 1))
    assert metrics.calibration(overconfident, labels).ece == pytest.approx(0.2)


def test_top_losses_and_unsure_are_sorted(answers):
    probabilities, labels = answers
    loss = metrics.losses(probabilities, labels)
    top = metrics.top_losses(probabilities, labels, 5)
    assert loss[top].tolist() == sorted(loss, reverse=True)[:5]
    unsure = metrics.unsure(probabilities, labels, len(labels))
    confidence = probabilities.max(axis=1)[unsure]
    assert (np.diff(confidence) >= 0).all()
    assert (probabilities.argmax(axis=1)[unsure] == labels[unsure]).all()
    assert len(unsure) == round(metrics.accuracy(probabilities, labels) * len(labels))


def test_the_interval_is_the_wilson_score_interval():
    # Agresti & Coull, 1998: 0 of 10 gives 0 to 0.278. The share is always inside.
    low, high = metrics.interval(0, 10)
    assert low == 0
    assert high == pytest.approx(0.2775, abs=1e-4)
    for photos in (1, 3, 221):
        for right in range(photos + 1):
            low, high = metrics.interval(right, photos)
            assert 0 <= low <= right / photos <= high <= 1
            mirrored = metrics.interval(photos - right, photos)
            assert mirrored == pytest.approx((1 - high, 1 - low))
    assert metrics.interval(980, 1000)[0] > metrics.interval(98, 100)[0]
