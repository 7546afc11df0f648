"""`fledge inspect`: the text describes the reports that a bundle has, and names those it lacks."""

from pathlib import Path

import pytest

import fledge
from serving.bundle import storage
from serving.bundle.inspect import describe
from serving.errors import BundleError
from tests.support.tiny_bundle import altered, tiny_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle", classes=10)


def test_reports_that_a_bundle_lacks_are_named(folder: Path) -> None:
    manifest = storage.read(folder).manifest
    text = "\n".join(describe(folder))
    assert text.startswith(f"tiny {manifest.version}: tiny, 10 classes\n")
    for words in (
        "daisy, rose, tulip, violet, poppy, lily, iris, aster, and 2 more",
        "32 x 32 pixels, crop 0.875 of the short side, bilinear, full decoding",
        "not compared with a checkpoint",
        "temperature 1, no threshold",
        "10, the plain one by default",
        "not measured",
        "5, unchanged since the export; 0.0 MB",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("fit", "words"), [("squish", "the whole image squished"), ("pad", "the whole image padded")]
)
def test_fit_and_decode_are_described(tmp_path: Path, fit: str, words: str) -> None:
    folder = tiny_bundle(tmp_path / "bundle", fit=fit, decode="scaled")
    text = "\n".join(describe(folder))
    assert f"32 x 32 pixels, {words} to a square, bilinear, scaled decoding" in text
    assert "8, the plain one by default" in text  # no view is wider than the whole picture


def test_reports_of_a_bundle_are_described(folder: Path) -> None:
    manifest = storage.read(folder).manifest
    worth = {"accuracy": 0.9, "loss": 0.3, "ece": 0.123}
    row = {"views": 4, "fixed": 3, "broken": 1, "p": 0.625, **worth}
    best = {"workers": 2, "threads": 1, "batch": 8, "images_per_second": 123.4}
    manifest = altered(
        folder,
        precisions={"fp32": {**manifest.precisions["fp32"], "accuracy": 0.912}},
        tried={"int8": {"kept": False, "why_not": "it is no faster here: 0.90 times fp32"}},
        parity={"photos": 221, "graphs": {"onnx": {"largest_difference": 3e-6}}},
        thresholds={"confident": 0.87, "energy": -3.0},
        calibration={"before": worth, "after": {**worth, "ece": 0.01}},
        tta={"photos": 221, "advised": 4, "plain": worth, "views": [row]},
        tuning={
            "cpu": {"throughput": {"fp32": best}, "latency": {"fp32": {"threads": 2, "ms": 9}}}
        },
        provenance={"run": "quick", "data": {"source": "flowers", "train": 867, "valid": 221}},
    )
    text = "\n".join(describe(folder))
    for words in (
        "accuracy 91.2%, 123 images/s at export",
        "int8: not in the bundle; it is no faster here: 0.90 times fp32",
        "on 221 held-out photos: largest difference of a probability 3.0e-06",
        "calibration error 12.3% -> 1.0%, confident from probability 0.87",
        "tta=4 corrects 3 of 221 held-out photos and breaks 1 (p = 0.62)",
        "fp32: workers=2 threads=1 batch=8; a single photo 9 ms with threads=2",
        "run quick, flowers: 867 photos, 221 held out",
    ):
        assert words in text
    tta = {**manifest.tta, "advised": 0}  # type: ignore[dict-item]
    storage.publish(manifest.model_copy(update={"tta": tta}), folder)
    assert "tta does not correct more of 221 held-out photos" in "\n".join(describe(folder))


def test_the_command_prints_the_description_or_the_manifest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fledge.main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out == "\n".join(describe(folder)) + "\n"
    assert fledge.main(["inspect", str(folder), "--json"]) == 0
    assert capsys.readouterr().out == storage.read(folder).manifest.to_json()


def test_a_changed_bundle_is_not_described(folder: Path) -> None:
    card = next(folder.glob("*/README.md"))
    card.write_text("changed")
    with pytest.raises(BundleError, match=r"README\.md was changed"):
        describe(folder)
