"""torchvision architectures -> a body that is one flat Sequential, cut into ordered layer groups.

A flat body makes freezing simple: a frozen prefix is `body[:n]`, what trains is `body[n:]`. A new
layer group begins wherever the resolution falls, which reproduces the usual hand-made cuts
(ResNet's layer1 to layer4, MobileNetV2's features at 2, 4, 7 and 14) without a table of them.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torchvision
from torch import Tensor, nn

from serving.errors import DataError, OptionError


def _features(network: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(network.get_submodule("features").named_children()))


def _layers(network: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(network.get_submodule("layers").named_children()))


def _densenet(network: nn.Module) -> nn.Sequential:
    body = _features(network)
    body.add_module("relu", nn.ReLU(inplace=True))  # DenseNet.forward applies it outside features
    return body


def _children(network: nn.Module) -> nn.Sequential:
    kept = [(k, v) for k, v in network.named_children() if k not in ("avgpool", "fc")]
    return nn.Sequential(OrderedDict(kept))


def _regnet(network: nn.Module) -> nn.Sequential:
    trunk = network.get_submodule("trunk_output").named_children()
    return nn.Sequential(OrderedDict([("stem", network.get_submodule("stem")), *trunk]))


# Name pattern -> how the body is taken out, and the prefix that its keys have in the weights file.
FAMILIES: Final[tuple[tuple[str, Callable[[nn.Module], nn.Sequential], str], ...]] = (
    (r"alexnet|vgg\d+(_bn)?|squeezenet\w+", _features, "features."),
    (r"mobilenet_\w+|efficientnet_\w+|convnext_\w+", _features, "features."),
    (r"densenet\d+", _densenet, "features."),
    (r"mnasnet\w+", _layers, "layers."),
    (r"resnet\d+|resnext\w+|wide_resnet\w+|shufflenet_\w+", _children, ""),
    (r"regnet_\w+", _regnet, ""),
)


@dataclass(frozen=True)
class Backbone:
    """A body without its classifier.

    body: float32 [N, 3, H, W] -> [N, width, h, w]; a flat Sequential.
    groups: for each layer group the index of its first child of `body`, ascending from 0.
    width: channels of the last feature map.
    """

    body: nn.Sequential
    groups: tuple[int, ...]
    width: int


def names() -> list[str]:
    """Every architecture that can be built here."""
    return [name for name in _known() if _family(name) is not None]


def build(arch: str, arch_args: Mapping[str, Any], weights: str = "none") -> Backbone:
    """Build a body, with weights if asked.

    Args:
        arch: A name from `names()`.
        arch_args: Options of torchvision's builder, such as `width_mult`.
        weights: "none"; "imagenet", by torchvision's own cached download; or a path to a state
            dict of the whole torchvision network (its classifier may be missing).

    Raises:
        OptionError: Unknown architecture or option.
        DataError: Weights that can't be had, or that belong to another architecture.
    """
    family = _family(arch)
    if family is None:
        near = difflib.get_close_matches(arch, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names())}"
        raise OptionError(f"arch = {arch!r} is unknown: {hint}")
    take_body, prefix = family
    try:
        network = torchvision.models.get_model(arch, weights=None, **arch_args)
    except Exception as error:  # builders check their options in many ways
        raise OptionError(f"arch_args = {dict(arch_args)!r} does not fit {arch}: {error}") from None
    body = take_body(network)
    if weights != "none":
        _load(body, _state_dict(arch, weights), prefix, arch, weights)
    groups, width = _measure(body)
    return Backbone(body, groups, width)


def _family(arch: str) -> tuple[Callable[[nn.Module], nn.Sequential], str] | None:
    if arch not in _known():
        return None
    matches = ((take, prefix) for pattern, take, prefix in FAMILIES if re.fullmatch(pattern, arch))
    return next(matches, None)


def _known() -> list[str]:
    known: list[str] = torchvision.models.list_models(module=torchvision.models)
    return known


def _state_dict(arch: str, weights: str) -> Mapping[str, Tensor]:
    if weights == "imagenet":
        entry = torchvision.models.get_model_weights(arch).DEFAULT
        try:
            return entry.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
        except Exception as error:  # no network, or a damaged file in the cache
            raise DataError(
                f"weights = 'imagenet': {entry.url} can't be fetched ({error}); "
                "give a file (weights = 'PATH.pth') or weights = 'none'"
            ) from error
    path = Path(weights).expanduser()
    if not path.is_file():
        raise DataError(f"weights = {weights!r}: no such file; use imagenet, none, auto or a path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a file not its own torch.load raises a zoo of types
        reason = (str(error) or "the file is empty or cut short").splitlines()[0][:100]
        raise DataError(f"weights = {weights!r} is no state dict: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"weights = {weights!r} is no state dict: it must map names to tensors")
    return state


def _load(
    body: nn.Sequential, state: Mapping[str, Tensor], prefix: str, arch: str, weights: str
) -> None:
    if arch.startswith("densenet"):  # the published files still use the names of old PyTorch
        old = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\..*)")
        state = {old.sub(r"\1\2", key): value for key, value in state.items()}
    if arch.startswith("regnet"):
        state = {key.removeprefix("trunk_output."): value for key, value in state.items()}
    own = body.state_dict()
    given = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    # Old files have no num_batches_tracked; it matters to nobody with a fixed momentum.
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    wrong = [k for k in own if k in given and own[k].shape != given[k].shape]
    # A deeper network of the same family has all keys of a shallower one, and more.
    own_parts = {k.partition(".")[0] for k in own}
    extra = [k for k in given if k not in own and k.partition(".")[0] in own_parts]
    if missing or wrong or extra:
        worst = (missing or wrong or extra)[0]
        why = "lacks" if missing else "has another shape for" if wrong else "also holds"
        raise DataError(
            f"weights = {weights!r} is not for {arch}: it {why} {prefix}{worst} ({len(missing)} "
            f"missing, {len(wrong)} of another shape, {len(extra)} too many, of {len(own)})"
        )
    body.load_state_dict({k: given.get(k, v) for k, v in own.items()})


def _measure(body: nn.Sequential) -> tuple[tuple[int, ...], int]:
    """Layer groups and output width, by a run on the meta device (no arithmetic is done)."""
    shadow = copy.deepcopy(body).to("meta").eval()
    groups, resolution = [0], 0
    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.no_grad():
        for index, child in enumerate(shadow):
            x = child(x)
            if index and x.shape[-1] < resolution:
                groups.append(index)
            resolution = x.shape[-1]
    # A bare pooling layer has nothing to train, so it is no group of its own: it joins the one
    # behind it, or at the end of the body (VGG, AlexNet) the one before.
    trains = [any(True for _ in child.parameters()) for child in body]
    kept = [0]
    for start in groups[1:]:
        if any(trains[kept[-1] : start]) and any(trains[start:]):
            kept.append(start)
    return tuple(kept), x.shape[1]
