"""Table of the supported families of torchvision architectures, such as ResNet or ViT.

For every family, the table contains a function that extracts the body: all layers except the
classifier, as one flat Sequential. `body[:n]` is then a network of the first n layers.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from serving.errors import OptionError


@dataclass(frozen=True)
class Family:
    """A family of torchvision architectures with the same structure.

    Attributes:
        title: Name of the family.
        archs: Regular expression that matches the names of the architectures.
        body: Function that extracts the body from a torchvision network without copying layers.
        side: Axis of the feature maps that shrinks when the resolution drops; 0: the resolution
            never drops, as in ViT.
        pooled: Name of the pooling that the body contains; "" if the output is a feature map.
        fixed: Options of torchvision's builder that are always set, and that recipes can't change.
        size_option: Option of torchvision's builder that sets the image size; "" if the network
            takes images of any size.
        sizes: Allowed values of `size_option` for error messages; "" if torchvision's own error
            message contains the allowed values.
        options: Names of options that torchvision's builder accepts, but that are hidden behind
            **kwargs in the signature of the network's class.
        old_names: (regular expression, replacement) pairs that rename the keys of state dicts of
            older torchvision versions.
    """

    title: str
    archs: str
    body: Callable[[nn.Module], nn.Sequential]
    side: int = -1
    pooled: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    size_option: str = ""
    sizes: str = ""
    options: tuple[str, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()

    def image_size(self, arch_args: Mapping[str, Any]) -> int:
        """Return the image size of the body in pixels; 224 if the body takes any size.

        Raises:
            OptionError: The value of `size_option` in `arch_args` is not a number of pixels.
        """
        given = arch_args.get(self.size_option, 224)
        size = given[0] if isinstance(given, list | tuple) and given else given
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            use = self.sizes or "a number of pixels, such as 224"
            raise OptionError(f"arch_args.{self.size_option} = {given!r}: use {use}")
        return size


def find_family(arch: str) -> Family | None:
    """Return the family of an architecture; None if the architecture is not supported."""
    return next((one for one in FAMILIES if re.fullmatch(one.archs, arch)), None)


def _flat(children: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))


def _features(network: nn.Module) -> nn.Sequential:
    return _flat(network.get_submodule("features").named_children())


def _layers(network: nn.Module) -> nn.Sequential:
    return _flat(network.get_submodule("layers").named_children())


def _children(network: nn.Module) -> nn.Sequential:
    classifier = ("avgpool", "dropout", "fc")
    return _flat((name, part) for name, part in network.named_children() if name not in classifier)


def _densenet(network: nn.Module) -> nn.Sequential:
    body = _features(network)
    body.add_module("relu", nn.ReLU(inplace=True))  # DenseNet.forward applies it outside features
    return body


def _regnet(network: nn.Module) -> nn.Sequential:
    trunk = network.get_submodule("trunk_output").named_children()
    return _flat([("stem", network.get_submodule("stem")), *trunk])


def _swin(network: nn.Module) -> nn.Sequential:
    after = [(name, network.get_submodule(name)) for name in ("norm", "permute")]
    return _flat([*network.get_submodule("features").named_children(), *after])


def _vit(network: Any) -> nn.Sequential:
    blocks = network.encoder.layers.named_children()
    start, end = ("tokens", PatchEmbedding(network)), ("ln", network.encoder.ln)
    return _flat([start, *blocks, end, ("class_token", SelectClassToken())])


def _maxvit(network: Any) -> nn.Sequential:
    pool, flatten, norm, linear, act, _ = network.classifier
    blocks = [(f"block{i}", block) for i, block in enumerate(network.blocks)]
    after = [("norm", norm), ("pre_logits", linear), ("act", act)]
    return _flat([("stem", network.stem), *blocks, ("pool", nn.Sequential(pool, flatten)), *after])


class PatchEmbedding(nn.Module):
    """Input layers of a ViT: images [N, 3, H, W] -> tokens [N, 1 + patches, D]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv_proj = network.conv_proj
        self.class_token = network.class_token
        self.pos_embedding = network.encoder.pos_embedding
        self.dropout = network.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches, prepend the class token and add the position embedding."""
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], -1, -1)
        tokens: Tensor = self.dropout(torch.cat([first, patches], dim=1) + self.pos_embedding)
        return tokens


class SelectClassToken(nn.Module):
    """Last layer of a ViT body: tokens [N, 1 + patches, D] -> class token [N, D]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


# Without the auxiliary classifiers of GoogLeNet and Inception v3.
_NO_AUX: Final = {"aux_logits": False, "transform_input": False, "init_weights": True}
_DENSENET_OLD: Final = ((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),)
_VIT_OLD: Final = ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3."))

FAMILIES: Final[tuple[Family, ...]] = (
    Family("AlexNet", r"alexnet", _features),
    Family("VGG", r"vgg\d+(_bn)?", _features),
    Family("ResNet", r"resnet\d+", _children),
    Family("ResNeXt", r"resnext\w+", _children),
    Family("Wide ResNet", r"wide_resnet\w+", _children),
    Family("DenseNet", r"densenet\d+", _densenet, old_names=_DENSENET_OLD),
    Family("SqueezeNet", r"squeezenet\w+", _features),
    Family("GoogLeNet", r"googlenet", _children, fixed=_NO_AUX),
    Family("Inception v3", r"inception_v3", _children, fixed=_NO_AUX),
    Family("MobileNetV2", r"mobilenet_v2", _features),
    Family(
        "MobileNetV3",
        r"mobilenet_v3_\w+",
        _features,
        options=("width_mult", "reduced_tail", "dilated"),
    ),
    Family("MNASNet", r"mnasnet\w+", _layers),
    Family("ShuffleNetV2", r"shufflenet_v2_\w+", _children),
    Family("EfficientNet", r"efficientnet_b\d", _features),
    Family("EfficientNetV2", r"efficientnet_v2_\w", _features),
    Family("RegNet", r"regnet_\w+", _regnet),
    Family("ConvNeXt", r"convnext_\w+", _features),
    Family("Swin", r"swin_[tsb]", _swin, side=1),
    Family("SwinV2", r"swin_v2_[tsb]", _swin, side=1),
    Family(
        "ViT",
        r"vit_\w+",
        _vit,
        side=0,
        pooled="class token",
        size_option="image_size",
        old_names=_VIT_OLD,
    ),
    Family(
        "MaxViT",
        r"maxvit_\w+",
        _maxvit,
        pooled="average",
        size_option="input_size",
        sizes="[N, N], N a multiple of 224",
    ),
)
