"""Shallow networks of torchvision's families, built of the same layers as the real ones.

PyTorch's exporter takes time for each layer. Each network has every kind of block of its family,
with few channels, and mostly once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torchvision
from torch import Tensor, nn
from torchvision.models import (
    convnext,
    densenet,
    efficientnet,
    inception,
    maxvit,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    shufflenetv2,
    squeezenet,
    swin_transformer,
    vgg,
    vision_transformer,
)

from training.models import backbones


class Features(nn.Module):
    """Layers of AlexNet, VGG or SqueezeNet with a small classifier."""

    def __init__(self, features: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Linear(4 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _alexnet(**_: Any) -> nn.Module:
    conv = [nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    conv += [nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    return Features(nn.Sequential(*conv), 16)


def _vgg(**_: Any) -> nn.Module:
    layers: list[str | int] = [8, "M", 16, "M", 16, 16, "M"]
    return Features(vgg.make_layers(layers, batch_norm=True), 16)


def _squeezenet(**_: Any) -> nn.Module:
    return Features(squeezenet.squeezenet1_1().features[:6], 128)


def _without(network: nn.Module, *names: str) -> nn.Module:
    """Remove blocks whose input and output have the same shape, or that are the last ones."""
    for name in names:
        setattr(network, name, nn.Identity())
    return network


def _resnet(block: Any, **options: Any) -> nn.Module:
    network = resnet.ResNet(block, [1, 1, 1, 1], **options)
    network.fc = nn.Linear(128 * block.expansion, 10)
    return _without(network, "layer3", "layer4")


def _googlenet(**options: Any) -> nn.Module:
    names = ("inception4b", "inception4c", "inception4d", "inception4e", "inception5a")
    return _without(
        torchvision.models.GoogLeNet(**options | {"init_weights": False}), *names, "inception5b"
    )


def _inception(**options: Any) -> nn.Module:
    """With one block of each of the five kinds."""
    network = inception.Inception3(**options | {"init_weights": False})
    names = ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")
    return _without(network, *names)


def _mnasnet(**_: Any) -> nn.Module:
    network = mnasnet.MNASNet(0.5)
    network.layers = network.layers[:10]
    return network


def _mobilenet_v3(**_: Any) -> nn.Module:
    block = mobilenetv3.InvertedResidualConfig
    setting = [
        block(16, 3, 16, 16, True, "RE", 2, 1, 1),
        block(16, 3, 24, 16, False, "RE", 1, 1, 1),
        block(16, 5, 32, 24, True, "HS", 2, 1, 1),
    ]
    return mobilenetv3.MobileNetV3(setting, last_channel=32)


def _efficientnet(**_: Any) -> nn.Module:
    block = efficientnet.MBConvConfig
    setting = [block(1, 3, 1, 8, 8, 1), block(4, 5, 2, 8, 16, 2)]
    return efficientnet.EfficientNet(setting, dropout=0.2, last_channel=32)


def _efficientnet_v2(**_: Any) -> nn.Module:
    fused, block = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    setting = [fused(1, 3, 1, 8, 8, 1), fused(4, 3, 2, 8, 16, 1), block(4, 3, 2, 16, 24, 2)]
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    return efficientnet.EfficientNet(setting, dropout=0.2, last_channel=32, norm_layer=norm)


def _regnet(**_: Any) -> nn.Module:
    parameters = regnet.BlockParams.from_init_params(3, 16, 12, 2.2, 8, se_ratio=0.25)
    return regnet.RegNet(parameters, stem_width=16)


def _convnext(**_: Any) -> nn.Module:
    block = convnext.CNBlockConfig
    return convnext.ConvNeXt([block(16, 24, 2), block(24, None, 1)], stochastic_depth_prob=0.1)


def _swin(**options: Any) -> nn.Module:
    """With two blocks, of which one shifts its windows, and a third at half the resolution."""
    return swin_transformer.SwinTransformer(
        [4, 4], 16, [2, 1], [2, 4], options.pop("window"), **options
    )


def _vit(image_size: int = 224, **_: Any) -> nn.Module:
    return vision_transformer.VisionTransformer(image_size, 32, 2, 4, 32, 64)


def _maxvit(**_: Any) -> nn.Module:
    return maxvit.MaxVit((224, 224), 8, 7, [8], [1], 8, 0.1)


BUILDERS: dict[str, Any] = {
    "alexnet": _alexnet,
    "vgg11_bn": _vgg,
    "resnet18": lambda **_: _resnet(resnet.BasicBlock),
    "resnext50_32x4d": lambda **_: _resnet(resnet.Bottleneck, groups=4, width_per_group=8),
    "wide_resnet50_2": lambda **_: _resnet(resnet.Bottleneck, width_per_group=96),
    "densenet121": lambda **_: densenet.DenseNet(8, (2, 2, 2, 2), num_init_features=16),
    "squeezenet1_1": _squeezenet,
    "googlenet": _googlenet,
    "inception_v3": _inception,
    "mobilenet_v2": lambda **_: mobilenetv2.MobileNetV2(
        width_mult=0.25,
        inverted_residual_setting=[[1, 16, 1, 2], [6, 16, 1, 1], [6, 24, 1, 2]],
    ),
    "mobilenet_v3_small": _mobilenet_v3,
    "mnasnet0_5": _mnasnet,
    "shufflenet_v2_x0_5": lambda **_: shufflenetv2.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64]),
    "efficientnet_b0": _efficientnet,
    "efficientnet_v2_s": _efficientnet_v2,
    "regnet_y_400mf": _regnet,
    "convnext_tiny": _convnext,
    "swin_t": lambda **_: _swin(window=[7, 7]),
    "swin_v2_t": lambda **_: _swin(
        window=[8, 8],
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    ),
    "vit_b_32": _vit,
    "maxvit_t": _maxvit,
}
"""Name of torchvision's smallest network of each family -> builder of a shallow one."""


def replace_networks(patch: pytest.MonkeyPatch) -> None:
    """Let torchvision's builder return the shallow networks for the names in `BUILDERS`."""

    def get_model(arch: str, weights: None = None, **options: Any) -> nn.Module:
        network = BUILDERS[arch](**options)
        assert isinstance(network, nn.Module)
        return network

    patch.setattr(torchvision.models, "get_model", get_model)
    # What is remembered of the real networks, and must not be of these.
    patch.setattr(backbones, "_GROUPS_AND_WIDTH", {})
    patch.setattr(backbones, "_FITTING_SIZES", set())
