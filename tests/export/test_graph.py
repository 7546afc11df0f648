"""The graph contract: inputs, outputs, and equality with the network as trained."""

import numpy as np
import pytest
import torch
from torch import nn

from export import graph
from serving.imaging.preprocess import Preprocess
from tests.export.conftest import pixels
from tests.support.random_batchnorms import randomise_batchnorms, scale_logits
from training.models.classifier import create_classifier, normalise

ODD = Preprocess(size=64, mean=(0.1, 0.5, 0.7), std=(0.1, 0.3, 0.9))


def classifier(arch="mobilenet_v2", **head):
    torch.manual_seed(0)
    x = normalise(pixels(8, 64), ODD)
    args = {"width_mult": 0.25} if arch == "mobilenet_v2" else {}
    network = create_classifier(arch, 5, arch_args=args, head={"hidden": 16, **head})
    return scale_logits(randomise_batchnorms(network, x), x)


def reference(original, x):
    """Logits and features of a network in float64, from pixels, by the definition."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (ODD.mean, ODD.std))
    images = ((x.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    features = original.features(images)
    return original.head(features), features


def same(one, other):
    return float((one - other).abs().max() / one.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["concat_pool", "linear"])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_logits_and_features_equal_the_checkpoint_s(kind, batch):
    original = classifier(kind=kind).double()
    assembled, report = graph.assemble(original, ODD)
    x = pixels(batch, 64)
    for one, other in zip(reference(original, x), assembled(x), strict=True):
        assert same(one, other) <= 1e-10
    assert all(name.startswith(("body.", "head.")) for name in report.folded)


@torch.no_grad()
def test_the_checkpoint_runtime_gives_the_bits_of_the_classifier():
    original = classifier()
    x = pixels(3, 64)
    logits, features = graph.CheckpointRuntime(original, ODD).run(x.numpy())
    images = normalise(x, ODD)
    assert np.array_equal(logits, original(images).numpy())
    assert np.array_equal(features, original.features(images).numpy())


def test_the_scale_is_folded_into_the_first_convolution():
    assembled, _ = graph.assemble(classifier(), ODD)
    assert assembled.scale is None


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


@torch.no_grad()
def test_a_network_without_a_first_convolution_gets_a_multiplication():
    original = classifier("squeezenet1_1")
    original.body.insert(0, Shift())
    original.double()
    assembled, _ = graph.assemble(original, ODD)
    assert assembled.scale is not None
    x = pixels(3, 64)
    for one, other in zip(reference(original, x), assembled(x), strict=True):
        assert same(one, other) <= 1e-10


def test_the_contract_has_names_dtypes_and_shapes():
    assembled, _ = graph.assemble(classifier(), ODD)
    assert graph.contract(assembled, ODD) == {
        "input": {"name": "pixels", "dtype": "uint8", "shape": ["batch", 64, 64, 3]},
        "outputs": {
            "logits": {"dtype": "float32", "shape": ["batch", 5]},
            "features": {"dtype": "float32", "shape": ["batch", 2560]},
        },
    }
