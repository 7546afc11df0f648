"""The parity gate accepts equal answers and refuses others."""

import subprocess
import sys

import numpy as np
import pytest

from export import parity
from serving.bundle.manifest import Manifest
from serving.errors import DataError, GateError
from serving.imaging import tta
from serving.imaging.preprocess import Preprocess
from serving.inference.predictor import Predictor
from tests.export.conftest import jpeg

PREPROCESS = Preprocess(size=16)
LABELS = ("blue", "green", "red")
MANIFEST = Manifest(
    name="m",
    version="v",
    arch="a",
    labels=LABELS,
    preprocess=PREPROCESS,
    precisions={},
    files={},
    temperature=1.5,
)


class Colours:
    """A runtime whose logits are the mean colours, changed by `spoil`."""

    provider = "numpy"

    def __init__(self, spoil=lambda logits: logits):
        self.spoil = spoil

    def run(self, pixels):
        logits = pixels.astype(np.float64).mean(axis=(1, 2)) / 32
        return self.spoil(logits), logits


def predictor(engine):
    return Predictor(MANIFEST.model_copy(update={"temperature": 1.0}), engine)


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for index in range(40):
        label = index % 3  # hue 0 is red, a third green, two thirds blue
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(jpeg(label / 3, rng))
        found.append((path, label))
    return found


def gate(samples, spoil=lambda logits: logits, workers=1, log=lambda line: None):
    graphs = {"onnx": predictor(Colours(spoil))}
    return parity.gate(Colours(), PREPROCESS, graphs, samples, workers, log)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_network_passes_with_any_number_of_workers(samples, workers):
    report = gate(samples, workers=workers).to_dict()
    assert report["graphs"]["onnx"].pop("largest_difference") <= 1e-12
    assert report == {
        "photos": 40,
        "skipped": 0,
        "batches": [1, 2, 7],
        "tolerance": 1e-4,
        "accuracy": {"checkpoint": 1.0, "onnx": 1.0},
        "graphs": {"onnx": {"top1_changed": 0, "ties": 0}},
        "classes": [
            {"class": index, "photos": 13 + (index == 0), "right": 13 + (index == 0)}
            for index in range(3)
        ],
    }


def test_the_worst_photo_and_its_difference_are_named(samples):
    worst = Colours().run(square(samples[17][0])[None])[0]

    def spoil(logits):
        off = np.abs(logits - worst).max(axis=1, keepdims=True) < 1e-9
        return logits + off * [0.5, 0, 0]

    lines = []
    with pytest.raises(GateError, match=r"onnx .*17\.jpg is off by 0\.\d+, tolerance 1e-04"):
        gate(samples, spoil, log=lines.append)
    assert lines[0] == "onnx: the photos with the largest differences"
    assert len(lines) == 1 + parity.WORST_SHOWN
    assert str(samples[17][0]) in lines[1]
    shown = [float(line.split()[0]) for line in lines[1:]]
    assert shown == sorted(shown, reverse=True)


def square(path):
    from serving.imaging import decode

    return PREPROCESS(decode.read(path).image)


@pytest.mark.parametrize("size", parity.BATCHES)
def test_a_difference_at_one_batch_size_only_is_found(samples, size):
    with pytest.raises(GateError):
        gate(samples, lambda logits: logits + np.array([1.0, 0, 0]) * (len(logits) == size))


def test_logits_that_are_nan_fail_the_gate(samples):
    with pytest.raises(Exception, match="not finite"):
        gate(samples, lambda logits: logits * np.nan)


def test_the_predicted_class_may_change_only_between_ties():
    truth = np.array([[0.5, 0.49999, 0.00001], [0.6, 0.3, 0.1]])
    agreement = parity.Agreement()
    parity._compare(agreement, truth, truth[:, [1, 0, 2]], ["tie", "change"])
    assert (agreement.ties, agreement.changed, agreement.worst) == ({"tie"}, {"change"}, "change")


def test_unreadable_photos_are_counted_and_many_are_an_error(samples):
    samples[3][0].write_bytes(b"\xff\xd8\xff\xe0 no photo at all")
    report = gate(samples)
    assert (report.photos, report.skipped) == (39, 1)
    for index in (4, 5):
        samples[index][0].unlink()
    with pytest.raises(DataError, match="3 of 40 validation photos can't be decoded"):
        gate(samples)
    with pytest.raises(DataError, match="no validation photos"):
        gate([])


def test_the_subsample_is_the_same_on_every_call(samples):
    drawn = parity.subsample(samples, 10)
    assert drawn == parity.subsample(samples, 10)
    assert drawn == sorted(drawn, key=samples.index)
    assert len(set(drawn)) == 10
    assert parity.subsample(samples, 40) == samples


def test_golden_images_are_copies_one_per_class_with_the_checkpoint_s_answers(samples, tmp_path):
    samples[1][0].write_bytes(b"the smallest of its class, and broken")
    (tmp_path / "payload").mkdir()
    golden = parity.write_golden(tmp_path / "payload", Colours(), MANIFEST, samples)
    assert len(golden) == 3
    originals = {path.read_bytes(): path for path, _ in samples}
    for item in golden:
        path = originals[(tmp_path / "payload" / item["file"]).read_bytes()]
        logits = Colours().run(square(path)[None])[0]
        assert item["probabilities"]["fp32"] == tta.softmax(logits, 1.5)[0].tolist()


def test_the_size_of_golden_images_is_limited(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "GOLDEN_BYTES", 100)
    assert len(parity.write_golden(tmp_path, Colours(), MANIFEST, samples)) == 1


def test_verifying_a_bundle_needs_no_torch(tmp_path):
    code = (
        "import sys, pathlib; from tests.support.tiny_bundle import tiny_bundle; "
        "from serving.inference.load import verify; "
        f"print(verify(tiny_bundle(pathlib.Path({str(tmp_path / 'b')!r})))); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fp32 on CPUExecutionProvider: 3 golden images" in done.stdout
