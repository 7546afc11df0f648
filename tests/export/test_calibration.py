"""Temperatures, thresholds and TTA advice for cases with known results."""

import math

import numpy as np
import pytest

from export import calibration
from export.calibration import ConfidenceTarget, HeldOut
from serving.bundle.manifest import Manifest
from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import VIEWS, average, softmax
from serving.inference.predictor import Predictor
from tests.export.conftest import jpeg


def drawn(temperature, count=4000, classes=5, views=1, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature); calibrated at `temperature`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(count, views, classes)).astype(np.float32)
    shares = softmax(logits[:, 0], temperature)
    labels = np.array([rng.choice(classes, p=row) for row in shares])
    return HeldOut(logits, labels)


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
def test_the_temperature_that_the_labels_were_drawn_at_is_found(truth):
    held_out = drawn(truth)
    found = calibration.fit_temperature(held_out.logits[:, 0], held_out.labels)
    assert found == pytest.approx(truth, rel=0.06)
    report = calibration.calibration_report(held_out, found)
    assert report["temperature"] == found
    assert report["photos"] == 4000
    assert report["after"]["ece"] <= 0.02
    if truth != 1:
        assert report["before"]["ece"] >= 0.05
        assert report["after"]["loss"] < report["before"]["loss"]
    assert report["after"]["accuracy"] == report["before"]["accuracy"]


@pytest.mark.parametrize("count", [1, 10, 200])
def test_the_temperature_is_finite_where_all_photos_are_right(count):
    labels = np.arange(count) % 3
    logits = 4 * np.eye(3, dtype=np.float32)[labels]
    found = calibration.fit_temperature(logits, labels)
    assert 0.05 < found < 20
    sure = softmax(logits, found).max()
    assert sure == pytest.approx(1 - 1 / (count + 2), abs=2e-3)


def test_with_one_class_the_temperature_is_one():
    assert calibration.fit_temperature(np.ones((4, 1), np.float32), np.zeros(4, np.int64)) == 1


def test_the_report_is_cross_validated():
    """On few photos, metrics on the fitted photos are too good on average."""
    own, after = [], []
    for seed in range(20):
        held_out = drawn(1.0, count=20, seed=seed)
        found = calibration.fit_temperature(held_out.logits[:, 0], held_out.labels)
        shares = softmax(held_out.logits[:, 0], found)
        own.append(-np.log(shares[np.arange(20), held_out.labels]).mean())
        after.append(calibration.calibration_report(held_out, found)["after"]["loss"])
    assert np.mean(after) > np.mean(own) + 0.01


def ranked(right, sure):
    """Two classes, plain view: photo i is right or wrong with probability sure[i]."""
    sure = np.asarray(sure)
    logits = np.stack([np.log(sure), np.log(1 - sure)], axis=1)[:, None].astype(np.float32)
    return HeldOut(logits, np.where(right, 0, 1))


HELD = ranked(
    [True, True, True, False, True, True, True, True, False, False],
    [0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.6],
)


@pytest.mark.parametrize(
    ("target", "kept", "right"),
    [
        ("precision=1", 3, 3),
        ("precision=0.87", 8, 7),
        ("precision=0.7", 10, 7),
        ("coverage=0.5", 5, 4),
        ("coverage=0.41", 5, 4),
        ("coverage=1", 10, 7),
    ],
)
def test_the_threshold_keeps_as_many_answers_as_the_target_allows(target, kept, right):
    found = calibration.confidence_threshold(HELD, 1.0, ConfidenceTarget.parse(target))
    sure = softmax(HELD.logits[:, 0]).max(axis=1)
    assert (sure >= found["threshold"]).sum() == kept
    assert found["coverage"] == kept / 10
    assert found["precision"] == right / kept
    low, high = found["precision_interval"]
    assert low < found["precision"] <= high
    assert found["asked"] == target


def test_equal_probabilities_are_on_the_same_side_of_the_threshold():
    held_out = ranked([True, False, True, True], [0.9, 0.9, 0.9, 0.8])
    assert (
        calibration.confidence_threshold(held_out, 1.0, ConfidenceTarget.parse("coverage=0.25"))[
            "coverage"
        ]
        == 0.75
    )


def test_a_precision_that_no_threshold_reaches_is_refused():
    held_out = ranked([False, True, True], [0.9, 0.8, 0.7])
    with pytest.raises(OptionError, match=r"at most 66\.7% of the confident answers to 3 held-out"):
        calibration.confidence_threshold(held_out, 1.0, ConfidenceTarget.parse("precision=0.99"))


@pytest.mark.parametrize("text", ["0.9", "precision", "coverage=0", "coverage=1.1", "recall=0.5"])
def test_a_text_that_is_no_target_is_refused(text):
    with pytest.raises(OptionError, match="--confident"):
        ConfidenceTarget.parse(text)


def test_energy_is_high_where_all_logits_are_low():
    logits = np.array([[9.0, 0, 0], [0, 0, 0]], np.float32)
    sure, unsure = calibration.energies(logits)
    assert sure == pytest.approx(-math.log(math.exp(9) + 2))
    assert unsure == pytest.approx(-math.log(3))
    held_out = drawn(1.0)
    threshold = calibration.energy_threshold(held_out)
    assert (calibration.energies(held_out.logits[:, 0]) <= threshold).mean() == pytest.approx(
        0.95, abs=0.002
    )


def test_the_advice_counts_photos_that_become_right_and_wrong():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    truth = 2 * np.eye(4)[labels][:, None]
    held_out = HeldOut((truth + rng.normal(scale=1.5, size=(300, 3, 4))).astype(np.float32), labels)
    advice = calibration.tta_advice(held_out, 1.0)
    plain = softmax(held_out.logits[:, 0]).argmax(1) == labels
    for row in advice["views"]:
        shares = np.stack([average(softmax(photo[: row["views"]])) for photo in held_out.logits])
        is_right = shares.argmax(1) == labels
        assert row["accuracy"] == is_right.mean()
        assert row["fixed"] == (is_right & ~plain).sum()
        assert row["broken"] == (plain & ~is_right).sum()
    assert [row["views"] for row in advice["views"]] == [2, 3]
    assert advice["plain"]["accuracy"] == plain.mean()
    assert advice["advised"] == 3
    assert advice["views"][1]["p"] < 1e-6
    assert "averaging 3 of them puts " in calibration.tta_summary(advice)
    assert "may be chance" not in calibration.tta_summary(advice)


def test_views_that_gain_nothing_are_not_advised():
    held_out = drawn(1.0, count=50, views=3)
    same = held_out._replace(logits=np.repeat(held_out.logits[:, :1], 3, axis=1))
    advice = calibration.tta_advice(same, 1.0)
    assert advice["advised"] == 0
    assert {row["p"] for row in advice["views"]} == {1.0}
    assert calibration.tta_summary(advice).startswith("no number of them")


def test_a_gain_of_one_photo_may_be_chance():
    logits = np.zeros((20, 2, 2), np.float32)
    logits[:, :, 0] = 1
    logits[7] = [[0, 1], [3, 0]]
    advice = calibration.tta_advice(HeldOut(logits, np.zeros(20, np.int64)), 1.0)
    assert advice["advised"] == 2
    assert (
        "1 of 20 held-out photos right and 0 wrong, which may be chance"
        in calibration.tta_summary(advice)
    )


class Means:
    """A runtime whose logits are the mean colours of the view."""

    def run(self, pixels):
        logits = pixels.astype(np.float32).mean(axis=(1, 2))
        return logits, logits


def test_all_views_are_run_and_unreadable_photos_left_out(tmp_path):
    preprocess, rng = Preprocess(size=16), np.random.default_rng(0)
    samples = []
    for index in range(5):
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(jpeg(index / 5, rng))
        samples.append((path, index % 3))
    samples[2][0].write_bytes(b"no photo")
    samples[4][0].unlink()
    manifest = Manifest(
        name="m",
        version="v",
        arch="a",
        labels=("x", "y", "z"),
        preprocess=preprocess,
        precisions={},
        files={},
    )
    predictor = Predictor(manifest, Means())
    held_out = calibration.predict_views(predictor, samples, workers=2)
    assert held_out.logits.shape == (3, len(VIEWS), 3)
    assert held_out.labels.tolist() == [0, 1, 0]
    for row, index in zip(held_out.logits, (0, 1, 3), strict=True):
        pixels = predictor.prepare(samples[index][0].read_bytes(), len(VIEWS)).pixels
        np.testing.assert_allclose(row, Means().run(pixels)[0], rtol=1e-6)
    assert calibration.predict_views(predictor, samples[4:]).logits.shape == (0, len(VIEWS), 3)
