"""Training, export and serving with real photos; needs FLEDGE_PHOTOS and FLEDGE_WEIGHTS."""

import os
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from serving.imaging.tta import softmax
from serving.inference.load import open_predictor
from serving.utils.cpu import cores
from tests.support.live_server import live
from training.config import load
from training.engine import finetune
from training.evaluation import evaluate
from training.run import checkpoint
from training.run.dataset import load_run_dataset

pytestmark = [pytest.mark.photos, pytest.mark.e2e, pytest.mark.process]


def folder_of(variable):
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short fine-tuning of the small MobileNetV2 on ants and bees."""
    photos, weights = folder_of("FLEDGE_PHOTOS"), folder_of("FLEDGE_WEIGHTS")
    torch.set_num_threads(cores())
    overrides = [
        f"weights={weights / 'mobilenet_v2_w035_features-9a21e17a.pth'}",
        "arch_args.width_mult=0.35",
        "preprocess.size=160",
        "stage.head.views=2",
        "stage.tail.cycles=1",
    ]
    return finetune.run(
        load.read(Path("training/recipes/quick.toml"), overrides),
        str(photos / "hymenoptera"),
        split=photos / "splits" / "hymenoptera.csv",
        out=tmp_path_factory.mktemp("photos") / "run",
        device="cpu",
        log=lambda line: None,
    )


@pytest.fixture(scope="module")
def bundle(run):
    from export import benchmark, pipeline

    out = run.parent / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SECONDS", 0.03)  # 90 measurements
        # With the default budget, the search for int8 tries every layer in float32 as well.
        options = pipeline.ExportOptions(accuracy_budget=10)
        pipeline.export(run, out, options, log=lambda line: None)
    return out


def test_a_short_fine_tuning_reaches_80_percent(run):
    metrics = checkpoint.read_info(run / "best.json").metrics
    assert metrics["accuracy"] >= 0.8
    assert evaluate.evaluate(run).accuracy == metrics["accuracy"]
    assert len(load_run_dataset(run).test) > 0


def test_http_answers_equal_the_checkpoints(run, bundle, tmp_path):
    classifier, info = checkpoint.load(run)
    samples = load_run_dataset(run).valid
    predictor = open_predictor(bundle, device="cpu", precision="fp32")
    pixels = np.concatenate([predictor.prepare(s.path.read_bytes()).pixels for s in samples])
    logits = evaluate.logits_of(classifier, torch.from_numpy(pixels), info.preprocess)
    expected = softmax(logits.numpy(), predictor.manifest.temperature)
    with (
        live(bundle, tmp_path / "log.txt", FLEDGE_PRECISION="fp32") as server,
        httpx.Client(timeout=60, trust_env=False) as client,
    ):
        url = f"{server.url}/predict?top_k={len(info.classes)}"
        for sample, row in zip(samples, expected, strict=True):
            answer = client.post(url, content=sample.path.read_bytes()).json()
            probabilities = {p["label"]: p["probability"] for p in answer["predictions"]}
            for name, probability in zip(info.classes, row, strict=True):
                assert probabilities[name] == pytest.approx(probability, abs=1e-4)
            assert answer["predictions"][0]["label"] == info.classes[int(row.argmax())]


def test_the_manifest_states_the_accuracy_of_the_chosen_precision(run, bundle):
    predictor = open_predictor(bundle, device="cpu")
    manifest, samples = predictor.manifest, load_run_dataset(run).valid
    tried = manifest.tried["int8"]
    assert tried["photos"] == len(samples)
    assert tried["kept"] == (tried["why_not"] is None) == ("int8" in manifest.precisions)
    assert predictor.precision == ("int8" if tried["kept"] else "fp32")
    answers = predictor.predict([predictor.prepare(s.path.read_bytes()) for s in samples])
    right = [a.probabilities.argmax() == s.label for a, s in zip(answers, samples, strict=True)]
    expected = manifest.precisions[predictor.precision]["accuracy"]
    assert np.mean(right) == pytest.approx(
        expected, abs=1.01 / len(samples)
    )  # a tie may be broken differently in a batch


def test_calibration_reduces_loss_and_calibration_error(bundle):
    manifest = open_predictor(bundle, device="cpu").manifest
    assert manifest.calibration["after"]["loss"] < manifest.calibration["before"]["loss"]
    assert manifest.calibration["after"]["ece"] < manifest.calibration["before"]["ece"]
