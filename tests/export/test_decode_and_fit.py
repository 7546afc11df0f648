"""Checkpoint and ONNX graph give the same answers for every combination of `decode` and `fit`."""

import dataclasses

import numpy as np
import pytest
import torch

from serving.imaging.decode import decode
from serving.imaging.preprocess import DECODES, FITS
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime
from tests.robustness import corpus
from tests.robustness.large_photos import PHOTOS
from training.models.classifier import normalise

FILES = [build(501, 379) for build in PHOTOS.values()]
FILES += [item.data for item in corpus.items() if item.code is None][::5]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("how", DECODES)
def test_the_checkpoint_answers_as_the_graph(exported, shared_run, how, fit):
    out, manifest, _ = exported
    preprocess = dataclasses.replace(shared_run.preprocess, decode=how, fit=fit)
    engine = OnnxRuntime(out / manifest.version / "model.onnx", device="cpu")
    predictor = Predictor(manifest.model_copy(update={"preprocess": preprocess}), engine)
    answers = predictor.predict([predictor.prepare(data) for data in FILES])
    decoded = [decode(data, preprocess=preprocess) for data in FILES]
    pixels = np.stack([preprocess(one.image, one.area) for one in decoded])
    with torch.no_grad():
        logits = shared_run.classifier(normalise(torch.from_numpy(pixels), preprocess))
    expected = (logits.double() / manifest.temperature).softmax(1).numpy()
    differences = np.abs(np.stack([one.probabilities for one in answers]) - expected)
    assert differences.max() <= 1e-4
    assert np.ptp(expected, axis=0).min() > 1e-2
