from pathlib import Path

import numpy as np
import pytest

from serving.bundle import storage
from serving.errors import BundleError, NotAnImage, OptionError, TooLarge, WorkError
from serving.imaging.decode import decode
from serving.imaging.tta import render, softmax
from serving.inference.load import _fastest, check_golden, open_predictor, verify
from serving.inference.predictor import Predictor
from tests.support.tiny_bundle import altered, photo, tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), classes=7)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return open_predictor(folder, device="cpu")


class Constant:
    """A runtime that gives the same logits to every row."""

    provider = "constant"

    def __init__(self, *logits: float) -> None:
        self.logits = np.array(logits, np.float32)

    def run(self, pixels):
        return np.tile(self.logits, (len(pixels), 1)), np.zeros((len(pixels), 1), np.float32)


def probabilities(predictor: Predictor, data: bytes, tta: int = 0) -> np.ndarray:
    return predictor.predict([predictor.prepare(data, tta)])[0].probabilities


def test_a_batch_gives_the_same_as_single_images(predictor: Predictor):
    wanted = [(1, 0), (2, 3), (3, 1), (4, 10), (5, 0)]
    prepared = [predictor.prepare(photo(seed), tta) for seed, tta in wanted]
    together = predictor.predict(prepared)
    assert [item.views for item in together] == [1, 3, 1, 10, 1]
    for item, (seed, tta) in zip(together, wanted, strict=True):
        single = probabilities(predictor, photo(seed), tta)
        np.testing.assert_allclose(item.probabilities, single, atol=1e-6)
        assert item.probabilities.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("max_rows", [1, 3, 4, 100])
def test_runs_of_fewer_rows_give_the_same(predictor: Predictor, max_rows: int, monkeypatch):
    wanted = [(1, 0), (2, 3), (4, 10)]
    prepared = [predictor.prepare(photo(seed), tta) for seed, tta in wanted]
    together = predictor.predict(prepared)
    rows: list[int] = []
    run = predictor.runtime.run
    monkeypatch.setattr(predictor.runtime, "run", lambda x: (rows.append(len(x)), run(x))[1])
    apart = predictor.predict(prepared, max_rows=max_rows)
    assert max(rows) <= max_rows
    assert sum(rows) == 14
    for one, other in zip(together, apart, strict=True):
        assert one.views == other.views
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
        np.testing.assert_allclose(one.features, other.features, atol=1e-5)
        assert one.energy == pytest.approx(other.energy, abs=1e-5)


def test_the_low_latency_runtime_gives_the_same_bits(folder: Path):
    opened = open_predictor(folder, device="cpu", low_latency_threads=2)
    assert opened.low_latency_runtime is not None
    for image in [opened.prepare(photo(seed)) for seed in range(4)]:
        (one_thread,), (two_threads,) = (
            opened.predict([image]),
            opened.predict([image], low_latency=True),
        )
        np.testing.assert_array_equal(one_thread.probabilities, two_threads.probabilities)
    assert open_predictor(folder, device="cpu").low_latency_runtime is None


def test_there_is_no_low_latency_runtime_if_the_tuning_measured_no_gain(tmp_path: Path):
    tuning = {"cpu": {"cores": 2, "latency": {"fp32": {"threads": 1, "ms": 1.0}}}}
    folder = tiny_bundle(tmp_path / "bundle")
    altered(folder, tuning=tuning)
    assert open_predictor(folder, device="cpu", low_latency_threads=2).low_latency_runtime is None
    # Nothing was measured on 4 cores.
    not_measured = open_predictor(folder, device="cpu", low_latency_threads=4)
    assert not_measured.low_latency_runtime is not None


def test_golden_images_are_checked_on_both_runtimes(folder: Path):
    opened = storage.read(folder)
    good = open_predictor(folder, device="cpu").runtime
    with pytest.raises(BundleError, match="is off by"):
        check_golden(Predictor(opened.manifest, good, "fp32", Constant(*range(7))), opened)


def test_check_golden_returns_the_largest_difference(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    golden = [dict(item) for item in storage.read(folder).manifest.golden]
    stated = golden[1]["probabilities"]["fp32"]
    golden[1]["probabilities"] = {"fp32": [stated[0] + 6e-5, stated[1] - 6e-5, stated[2]]}
    republish(folder, golden=tuple(golden))
    difference = check_golden(open_predictor(folder, device="cpu"), storage.read(folder))
    assert difference == pytest.approx(6e-5, rel=0.1)
    assert any(f"difference {difference:.1e}, tolerance 1.0e-04" in x for x in verify(folder))


def test_an_empty_batch_gives_no_predictions(predictor: Predictor):
    assert predictor.predict([]) == []


def test_tta_1_gives_the_probabilities_of_tta_0(predictor: Predictor):
    plain = probabilities(predictor, photo(1), 0)
    np.testing.assert_array_equal(probabilities(predictor, photo(1), 1), plain)


def test_tta_is_the_mean_over_the_views(predictor: Predictor):
    manifest = predictor.manifest
    picture = decode(photo(2)).image
    pixels = render(picture, manifest.preprocess, manifest.views[:4])
    logits, _ = predictor.runtime.run(pixels)
    expected = softmax(logits, manifest.temperature).mean(axis=0)
    np.testing.assert_allclose(probabilities(predictor, photo(2), 4), expected, atol=1e-12)


@pytest.mark.parametrize("tta", [-1, 11])
def test_more_views_than_there_are_is_an_error(predictor: Predictor, tta: int):
    with pytest.raises(OptionError, match=f"tta = {tta}"):
        predictor.prepare(photo(1), tta)


def test_the_manifest_decides_temperature_and_average(predictor: Predictor):
    runtime = Constant(0, 1, 2, 3, 4, 5, 6)
    softened = Predictor(predictor.manifest.model_copy(update={"temperature": 2.0}), runtime)
    expected = np.exp(np.arange(7) / 2) / np.exp(np.arange(7) / 2).sum()
    np.testing.assert_allclose(probabilities(softened, photo(1)), expected, rtol=1e-12)


def test_the_answer_has_the_model_and_the_five_most_probable_classes(predictor: Predictor):
    data = photo(3)
    prediction = predictor.predict([predictor.prepare(data)])[0]
    answer = predictor.answer(prediction)
    manifest = predictor.manifest
    assert answer["model"] == f"tiny:{manifest.version}"
    assert answer["precision"] == "fp32"
    assert answer["confident"] is None
    assert answer["applied"] == []
    assert len(answer["predictions"]) == 5
    shown = [item["probability"] for item in answer["predictions"]]
    assert shown == sorted(prediction.probabilities, reverse=True)[:5]
    for item in answer["predictions"]:
        index = manifest.labels.index(item["label"])
        assert item["probability"] == prediction.probabilities[index]


@pytest.mark.parametrize("top_k", [0, -1, 8])
def test_top_k_is_one_to_the_number_of_classes(predictor: Predictor, top_k: int):
    prediction = predictor.predict([predictor.prepare(photo(1))])[0]
    assert len(predictor.answer(prediction, 7)["predictions"]) == 7
    with pytest.raises(OptionError, match=f"top_k = {top_k}"):
        predictor.answer(prediction, top_k)


def test_ties_go_to_the_first_label(predictor: Predictor):
    even = Predictor(predictor.manifest, Constant(1, 2, 2, 1, 2, 1, 1))
    prediction = even.predict([even.prepare(photo(1))])[0]
    order = [item["label"] for item in even.answer(prediction, 7)["predictions"]]
    assert order == [predictor.manifest.labels[index] for index in (1, 2, 4, 0, 3, 5, 6)]


@pytest.mark.parametrize(("threshold", "confident"), [(0.1, True), (0.9, False), (None, None)])
def test_confident_is_stated_if_there_is_a_threshold(predictor: Predictor, threshold, confident):
    manifest = predictor.manifest.model_copy(update={"thresholds": {"confident": threshold}})
    even = Predictor(manifest, Constant(*[0] * 7))
    assert even.answer(even.predict([even.prepare(photo(1))])[0])["confident"] is confident


@pytest.mark.parametrize(("threshold", "strange"), [(-3.0, True), (-1.0, False), (None, None)])
def test_out_of_distribution_is_stated_if_there_is_a_threshold(
    predictor: Predictor, threshold, strange
):
    changes = {"thresholds": {"energy": threshold}, "temperature": 3.0}
    manifest = predictor.manifest.model_copy(update=changes)
    even = Predictor(manifest, Constant(*[0] * 7))  # -log 7 = -1.95, whatever the temperature
    for count in (0, 4):  # only the plain view counts
        prediction = even.predict([even.prepare(photo(1), count)] * 3)[2]
        assert prediction.energy == pytest.approx(-np.log(7))
        assert even.answer(prediction)["out_of_distribution"] is strange


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(predictor: Predictor, bad: float):
    broken = Predictor(predictor.manifest, Constant(0, 0, 0, bad, 0, 0, 0))
    with pytest.raises(WorkError, match="finite"):
        broken.predict([broken.prepare(photo(1))])


def test_a_bad_image_is_refused_when_it_is_prepared(predictor: Predictor):
    with pytest.raises(NotAnImage):
        predictor.prepare(b"hello")
    with pytest.raises(TooLarge):
        predictor.prepare(photo(1), max_pixels=100)


def republish(folder: Path, **changes: object) -> Path:
    altered(folder, **changes)
    return folder


def test_a_bundle_with_other_golden_probabilities_is_not_opened(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    golden = [dict(item) for item in storage.read(folder).manifest.golden]
    golden[1]["probabilities"] = {"fp32": [0.2, 0.3, 0.5]}
    republish(folder, golden=tuple(golden))
    with pytest.raises(BundleError, match=r"golden/1\.jpg in fp32 .* off by"):
        open_predictor(folder, device="cpu")


def test_the_tolerance_is_that_of_the_manifest(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    manifest = storage.read(folder).manifest
    golden = [dict(item) for item in manifest.golden]
    stated = np.array(golden[0]["probabilities"]["fp32"])
    shift = 1e-3 * np.where(stated > 0.5, -1, 0.5)
    golden[0]["probabilities"] = {"fp32": (stated + shift).tolist()}
    entry = dict(manifest.precisions["fp32"])
    republish(folder, golden=tuple(golden), precisions={"fp32": {**entry, "tolerance": 2e-3}})
    open_predictor(folder, device="cpu")
    republish(folder, precisions={"fp32": {**entry, "tolerance": 1e-4}})
    with pytest.raises(BundleError, match=r"tolerance 0\.0001"):
        open_predictor(folder, device="cpu")


@pytest.mark.parametrize("golden", [(), ({"file": "golden/0.jpg", "probabilities": {}},)])
def test_a_bundle_without_golden_probabilities_is_not_opened(tmp_path: Path, golden):
    folder = republish(tiny_bundle(tmp_path), golden=golden)
    with pytest.raises(BundleError, match="golden"):
        open_predictor(folder, device="cpu")


@pytest.mark.parametrize("tolerance", [0, -1, 0.06, 1.0])
def test_a_tolerance_that_checks_nothing_is_refused(tmp_path: Path, tolerance: float):
    folder = tiny_bundle(tmp_path)
    entry = dict(storage.read(folder).manifest.precisions["fp32"])
    republish(folder, precisions={"fp32": {**entry, "tolerance": tolerance}})
    with pytest.raises(BundleError, match="tolerance"):
        open_predictor(folder, device="cpu")


def test_a_bundle_with_more_labels_than_probabilities_is_refused(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    republish(folder, labels=(*storage.read(folder).manifest.labels, "one more"))
    with pytest.raises(BundleError, match="3 probabilities stated for 4 labels"):
        open_predictor(folder, device="cpu")


def test_a_runtime_that_fails_on_golden_images_is_a_bundle_error(folder: Path):
    opened = storage.read(folder)
    broken = Predictor(opened.manifest, Constant(*[np.nan] * 7))
    with pytest.raises(BundleError, match="finite"):
        check_golden(broken, opened)


def test_a_precision_that_the_bundle_lacks_is_named(folder: Path):
    with pytest.raises(OptionError, match="precision = int8"):
        open_predictor(folder, device="cpu", precision="int8")


def test_auto_precision_depends_on_the_device():
    cpu, gpu = "CPUExecutionProvider", "CUDAExecutionProvider"
    everything = {"fp32", "int8", "fp16"}
    assert _fastest(everything, cpu) == "int8"
    assert _fastest(everything, gpu) == "fp16"
    assert _fastest({"fp32", "fp16"}, cpu) == _fastest({"fp32", "int8"}, gpu) == "fp32"
