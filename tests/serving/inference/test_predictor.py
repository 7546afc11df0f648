from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.bundle import storage
from serving.errors import BundleError, NotAnImage, OptionError, TooLarge, WorkError
from serving.imaging import decode as images
from serving.imaging import tta as views
from serving.inference.load import _fastest, check_golden, open_predictor
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


def test_together_is_the_same_as_alone(predictor: Predictor):
    wanted = [(1, 0), (2, 3), (3, 1), (4, 10), (5, 0)]
    prepared = [predictor.prepare(photo(seed), tta) for seed, tta in wanted]
    together = predictor.predict(prepared)
    assert [item.views for item in together] == [1, 3, 1, 10, 1]
    for item, (seed, tta) in zip(together, wanted, strict=True):
        alone = probabilities(predictor, photo(seed), tta)
        np.testing.assert_allclose(item.probabilities, alone, atol=1e-6)
        assert item.probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_a_lone_image_gets_the_same_bits_from_more_cores(folder: Path):
    low_latency_runtime = open_predictor(folder, device="cpu", low_latency_runtime=2)
    prepared = [low_latency_runtime.prepare(photo(seed)) for seed in range(4)]
    for one in prepared:
        (apart,), (all_cores,) = (
            low_latency_runtime.predict([one]),
            low_latency_runtime.predict([one], alone=True),
        )
        np.testing.assert_array_equal(apart.probabilities, all_cores.probabilities)
    assert open_predictor(folder, device="cpu").low_latency_runtime is None


def test_more_cores_are_left_alone_where_the_tuning_found_no_use_for_them(tmp_path: Path):
    tuning = {"cpu": {"cores": 2, "latency": {"fp32": {"threads": 1, "ms": 1.0}}}}
    folder = tiny_bundle(tmp_path / "bundle")
    altered(folder, tuning=tuning)
    assert open_predictor(folder, device="cpu", low_latency_runtime=2).low_latency_runtime is None
    assert (
        open_predictor(folder, device="cpu", low_latency_runtime=4).low_latency_runtime is not None
    )  # nobody has measured


def test_golden_images_are_asked_of_both_engines(folder: Path):
    opened = storage.read(folder)
    good = open_predictor(folder, device="cpu").runtime
    with pytest.raises(BundleError, match="is off by"):
        check_golden(Predictor(opened.manifest, good, "fp32", Constant(*range(7))), opened)


def test_nothing_in_nothing_out(predictor: Predictor):
    assert predictor.predict([]) == []


def test_tta_one_is_tta_zero(predictor: Predictor):
    plain = probabilities(predictor, photo(1), 0)
    np.testing.assert_array_equal(probabilities(predictor, photo(1), 1), plain)


def test_tta_is_the_mean_over_the_views(predictor: Predictor):
    manifest = predictor.manifest
    picture = images.decode(photo(2)).image
    pixels = views.render(picture, manifest.preprocess, manifest.views[:4])
    logits, _ = predictor.runtime.run(pixels)
    expected = views.softmax(logits, manifest.temperature).mean(axis=0)
    np.testing.assert_allclose(probabilities(predictor, photo(2), 4), expected, atol=1e-12)


@pytest.mark.parametrize("tta", [-1, 11])
def test_more_views_than_there_are_is_an_error(predictor: Predictor, tta: int):
    with pytest.raises(OptionError, match=f"tta = {tta}"):
        predictor.prepare(photo(1), tta)


def test_the_manifest_decides_temperature_and_average(predictor: Predictor):
    runtime = Constant(0, 1, 2, 3, 4, 5, 6)
    warm = Predictor(replace(predictor.manifest, temperature=2.0), runtime)
    expected = np.exp(np.arange(7) / 2) / np.exp(np.arange(7) / 2).sum()
    np.testing.assert_allclose(probabilities(warm, photo(1)), expected, rtol=1e-12)


def test_the_answer(predictor: Predictor):
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
def test_confident_once_there_is_a_threshold(predictor: Predictor, threshold, confident):
    manifest = replace(predictor.manifest, thresholds={"confident": threshold})
    even = Predictor(manifest, Constant(*[0] * 7))
    assert even.answer(even.predict([even.prepare(photo(1))])[0])["confident"] is confident


@pytest.mark.parametrize(("threshold", "strange"), [(-3.0, True), (-1.0, False), (None, None)])
def test_strange_once_there_is_a_threshold(predictor: Predictor, threshold, strange):
    manifest = replace(predictor.manifest, thresholds={"energy": threshold}, temperature=3.0)
    even = Predictor(manifest, Constant(*[0] * 7))  # -log 7 = -1.95, whatever the temperature
    for count in (0, 4):  # the plain view's alone counts
        prediction = even.predict([even.prepare(photo(1), count)] * 3)[2]
        assert prediction.energy == pytest.approx(-np.log(7))
        assert even.answer(prediction)["out_of_distribution"] is strange


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_answer(predictor: Predictor, bad: float):
    broken = Predictor(predictor.manifest, Constant(0, 0, 0, bad, 0, 0, 0))
    with pytest.raises(WorkError, match="finite"):
        broken.predict([broken.prepare(photo(1))])


def test_a_bad_image_is_refused_before_it_meets_others(predictor: Predictor):
    with pytest.raises(NotAnImage):
        predictor.prepare(b"hello")
    with pytest.raises(TooLarge):
        predictor.prepare(photo(1), max_pixels=100)


def republish(folder: Path, **changes: object) -> Path:
    altered(folder, **changes)
    return folder


def test_a_bundle_that_answers_otherwise_is_not_opened(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    golden = [dict(item) for item in storage.read(folder).manifest.golden]
    golden[1]["probabilities"] = {"fp32": [0.2, 0.3, 0.5]}
    republish(folder, golden=tuple(golden))
    with pytest.raises(BundleError, match=r"golden/1\.jpg in fp32 .* off by"):
        open_predictor(folder, device="cpu")


def test_tolerance_is_the_manifests(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    manifest = storage.read(folder).manifest
    golden = [dict(item) for item in manifest.golden]
    stated = np.array(golden[0]["probabilities"]["fp32"])
    nudge = 1e-3 * np.where(stated > 0.5, -1, 0.5)
    golden[0]["probabilities"] = {"fp32": (stated + nudge).tolist()}
    entry = dict(manifest.precisions["fp32"])
    republish(folder, golden=tuple(golden), precisions={"fp32": {**entry, "tolerance": 2e-3}})
    open_predictor(folder, device="cpu")
    republish(folder, precisions={"fp32": {**entry, "tolerance": 1e-4}})
    with pytest.raises(BundleError, match=r"tolerance 0\.0001"):
        open_predictor(folder, device="cpu")


@pytest.mark.parametrize("golden", [(), ({"file": "golden/0.jpg", "probabilities": {}},)])
def test_what_can_not_be_checked_is_not_opened(tmp_path: Path, golden):
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


def test_a_label_too_many_is_refused(tmp_path: Path):
    folder = tiny_bundle(tmp_path)
    republish(folder, labels=(*storage.read(folder).manifest.labels, "one more"))
    with pytest.raises(BundleError, match="3 probabilities stated for 4 labels"):
        open_predictor(folder, device="cpu")


def test_an_engine_that_fails_on_golden_images_is_a_bundle_not_to_be_served(folder: Path):
    opened = storage.read(folder)
    broken = Predictor(opened.manifest, Constant(*[np.nan] * 7))
    with pytest.raises(BundleError, match="finite"):
        check_golden(broken, opened)


def test_a_precision_that_was_not_kept_is_named(folder: Path):
    with pytest.raises(OptionError, match="precision = int8"):
        open_predictor(folder, device="cpu", precision="int8")


def test_auto_precision_fits_the_device():
    cpu, gpu = "CPUExecutionProvider", "CUDAExecutionProvider"
    everything = {"fp32", "int8", "fp16"}
    assert _fastest(everything, cpu) == "int8"
    assert _fastest(everything, gpu) == "fp16"
    assert _fastest({"fp32", "fp16"}, cpu) == _fastest({"fp32", "int8"}, gpu) == "fp32"
