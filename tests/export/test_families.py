"""The smallest network of each family is exported and passes the parity gate."""

import dataclasses

import onnx
import pytest
import torch

from export import benchmark, pipeline
from serving.bundle import storage
from training.models import families
from training.models.classifier import create_classifier

SMALLEST = {
    "AlexNet": "alexnet",
    "VGG": "vgg11_bn",
    "ResNet": "resnet18",
    "ResNeXt": "resnext50_32x4d",
    "Wide ResNet": "wide_resnet50_2",
    "DenseNet": "densenet121",
    "SqueezeNet": "squeezenet1_1",
    "GoogLeNet": "googlenet",
    "Inception v3": "inception_v3",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3": "mobilenet_v3_small",
    "MNASNet": "mnasnet0_5",
    "ShuffleNetV2": "shufflenet_v2_x0_5",
    "EfficientNet": "efficientnet_b0",
    "EfficientNetV2": "efficientnet_v2_s",
    "RegNet": "regnet_y_400mf",
    "ConvNeXt": "convnext_tiny",
    "Swin": "swin_t",
    "SwinV2": "swin_v2_t",
    "ViT": "vit_b_32",
    "MaxViT": "maxvit_t",
}
SIZES = {"inception_v3": 96, "maxvit_t": 224}
LEFT = {"densenet121": 62}
"""BatchNorms that can't be folded: in DenseNet after a concatenation and before a ReLU."""


def test_the_tested_networks_cover_every_family() -> None:
    assert list(SMALLEST) == [family.title for family in families.FAMILIES]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST.values())
def test_the_smallest_network_of_a_family_passes_the_parity_gate(run, tmp_path, monkeypatch, arch):
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
