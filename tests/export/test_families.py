"""A network of each family is exported and passes the parity gate.

The networks are shallow: `tests/training/models` tests torchvision's own.
"""

import dataclasses

import onnx
import pytest
import torch

from export import benchmark, pipeline
from serving.bundle import storage
from tests.support.shallow_networks import BUILDERS, replace_networks
from training.models import families
from training.models.classifier import create_classifier

SIZES = {"inception_v3": 96, "maxvit_t": 224}
LEFT = {"densenet121": 12}
"""BatchNorms that can't be folded: in DenseNet after a concatenation and before a ReLU."""


def test_the_tested_networks_cover_every_family() -> None:
    found = [families.find_family(arch) for arch in BUILDERS]
    assert found == list(families.FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("arch", BUILDERS)
def test_a_network_of_each_family_passes_the_parity_gate(run, tmp_path, monkeypatch, arch):
    replace_networks(monkeypatch)
    monkeypatch.setattr(benchmark, "measure", lambda *_: {})
    monkeypatch.setattr(benchmark, "advice", lambda *_: {})
    size = SIZES.get(arch, 64)
    args = {"image_size": 64} if arch == "vit_b_32" else {}
    head = {"kind": "deep" if arch in ("vit_b_32", "maxvit_t") else "concat_pool", "hidden": 32}
    run.preprocess = dataclasses.replace(run.preprocess, size=size)
    torch.manual_seed(0)
    run.classifier = create_classifier(arch, 3, arch_args=args, head=head)
    run.randomise(centred=False)  # float32 rounding moves centred logits by more than 1e-4
    run.info = dataclasses.replace(
        run.info, arch=arch, arch_args=args, head=head, preprocess=run.preprocess
    )
    run.save()
    out = tmp_path / "bundle"
    options = pipeline.ExportOptions(precision="fp32")
    manifest = pipeline.export(run.folder, out, options, log=lambda line: None)
    assert set(manifest.parity["graphs"]) == {"onnx", "torchscript", "torch.export"}
    assert len(manifest.batchnorm["left"]) == LEFT.get(arch, 0)
    graph = onnx.load(storage.read(out).graph("fp32")).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
