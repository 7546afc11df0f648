"""Build backbones: torchvision networks without classifier, divided into layer groups.

A backbone is one flat nn.Sequential. A layer group is a range of its children that is frozen or
trained as a whole. A new group starts wherever the resolution drops. This gives the usual groups
(layer1 to layer4 of ResNet; features 2, 4, 7 and 14 of MobileNetV2) without a table of layers for
each architecture. In a ViT all blocks have the same resolution, and are divided into four groups.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from serving.errors import OptionError
from training.models import weights
from training.models.families import Family, find_family


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier.

    Attributes:
        body: The layers as a flat Sequential: float32 [N, 3, H, W] -> feature map [N, width, h, w],
            or [N, width] if the body contains the pooling.
        groups: Index of the first child of each layer group, ascending from 0.
        width: Number of channels of the output.
        pooled: Name of the pooling that the body contains; "" if the body has none.
    """

    body: nn.Sequential
    groups: tuple[int, ...]
    width: int
    pooled: str = ""


def names() -> list[str]:
    """Return the names of all supported architectures."""
    known = torchvision.models.list_models(module=torchvision.models)
    return [name for name in known if find_family(name) is not None]


def build(arch: str, arch_args: Mapping[str, Any], pretrained: str = "none") -> Backbone:
    """Build a backbone, optionally with pretrained weights.

    Args:
        arch: One of `names()`.
        arch_args: Options of torchvision's builder, such as `width_mult`.
        pretrained: "none"; "imagenet" (downloaded by torchvision at first use); or the path of a
            state dict of the torchvision network. The file may lack the classifier.

    Raises:
        OptionError: The architecture or an option is unknown.
        DataError: The weights can't be read or downloaded, or belong to another architecture.
    """
    family = family_of(arch)
    network = _network(arch, arch_args, family)
    body = _body(network, arch, arch_args, family)
    if pretrained != "none":
        state = weights.read_state_dict(arch, pretrained, family.image_size(arch_args))
        weights.load_into_body(body, network, state, family, arch, pretrained)
    return _split_groups(body, arch, arch_args, family)


def build_on_meta(arch: str, arch_args: Mapping[str, Any]) -> Backbone:
    """Build a backbone on the meta device: its tensors have shapes but no values. This is fast.

    Args:
        arch: One of `names()`.
        arch_args: Options of torchvision's builder, such as `width_mult`.

    Raises:
        OptionError: The architecture or an option is unknown.
    """
    family = family_of(arch)
    with ShapesOnly():
        network = _network(arch, arch_args, family)
    body = _body(network, arch, arch_args, family).to("meta")
    return _split_groups(body, arch, arch_args, family)


def check_size(
    arch: str, arch_args: Mapping[str, Any], size: int, option: str = "preprocess.size"
) -> None:
    """Check that the architecture supports an image size.

    Args:
        arch: One of `names()`.
        arch_args: Options of torchvision's builder, such as `width_mult`.
        size: Side of the images in pixels.
        option: Name of the size's option in the error message.

    Raises:
        OptionError: The size is not supported. The message contains a supported size.
    """
    family = family_of(arch)
    default_size = family.image_size(arch_args)
    wrong = f"{option} = {size} does not fit {arch}: "
    if family.size_option:
        if size != default_size:
            change = f"arch_args.{family.size_option} changes it"
            change += f": {family.sizes}" if family.sizes else ""
            raise OptionError(f"{wrong}use {default_size} ({change})")
        return
    body = build_on_meta(arch, arch_args).body
    known = *_key(body, arch, arch_args), size
    if known in _FITTING_SIZES:
        return
    if _supports_size(body, size):
        _FITTING_SIZES.add(known)
        return
    low, high = size, default_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _supports_size(body, middle) else (middle, high)
    raise OptionError(f"{wrong}use {high} or more")


def meta_outputs(body: nn.Sequential, size: int) -> Iterator[Tensor]:
    """Yield the output of each child of `body` for an image [1, 3, size, size] as a meta tensor."""
    x = torch.empty(1, 3, size, size, device="meta")
    training = {module: module.training for module in body.modules()}
    body.eval()
    try:
        for child in body:
            state = {name: tensor.to("meta") for name, tensor in child.state_dict().items()}
            with torch.no_grad(), ShapesOnly():
                x = torch.func.functional_call(child, state, x)
            yield x
    finally:
        for module, mode in training.items():
            module.training = mode


def family_of(arch: str) -> Family:
    """Return the family of an architecture.

    Raises:
        OptionError: The architecture is unknown.
    """
    family = find_family(arch)
    if family is None or arch not in names():
        near = difflib.get_close_matches(arch, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fledge layers` lists them all"
        raise OptionError(f"arch = {arch!r} is unknown: {hint}")
    return family


class ShapesOnly(TorchFunctionMode):
    """Context in which networks are built and run on the meta device.

    Functions that do not change shapes are skipped. The alternative, `with torch.device("meta")`,
    is ten times slower. It also fails for RegNet, whose builder needs the values of some tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ALLOCATING and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        elif func in _SAME_SHAPE or (func.__name__ in _FILLS and args and args[0].is_meta):
            return args[0]
        return func(*args, **kwargs)


_ALLOCATING: Final = {torch.empty, torch.zeros, torch.ones}  # weights, and buffers of BatchNorms
_SAME_SHAPE: Final = {
    nn.functional.batch_norm,
    nn.functional.layer_norm,
    nn.functional.relu,
    nn.functional.relu6,
    nn.functional.hardtanh,  # of nn.ReLU6; its meta implementation is slow
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.hardswish,
    nn.functional.hardsigmoid,
}
_FILLS: Final = ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")


def _network(arch: str, arch_args: Mapping[str, Any], family: Family) -> nn.Module:
    for name in arch_args:
        if name in family.fixed or name in _NO_EFFECT:
            remedy = _NO_EFFECT.get(name, "remove it")
            raise OptionError(f"arch_args.{name} can't be set for {arch}: {remedy}")
    try:
        network: nn.Module = torchvision.models.get_model(
            arch, weights=None, **arch_args, **family.fixed
        )
    except Exception as error:  # builders raise many types of errors
        reason = str(error).partition("\n")[0]
        if family.sizes and family.size_option in arch_args:
            reason = f"{reason}; use {family.sizes}"
        raise OptionError(
            f"arch_args = {dict(arch_args)!r} does not fit {arch}: {reason}"
        ) from None
    # Classes with **kwargs ignore unknown options.
    parameters = inspect.signature(type(network)).parameters
    has_kwargs = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name in arch_args:
        if has_kwargs and name not in (*parameters, *family.options):
            raise OptionError(f"arch_args.{name}: {arch} has no such option; remove it")
    return network


def _body(
    network: nn.Module, arch: str, arch_args: Mapping[str, Any], family: Family
) -> nn.Sequential:
    body = family.body(network)
    if "dropout" in arch_args and not any(isinstance(m, nn.Dropout) for m in body.modules()):
        raise OptionError(
            f"arch_args.dropout belongs to {arch}'s own classifier: set head.dropout instead"
        )
    return body


_NO_EFFECT: Final = {
    "num_classes": "the photos determine the classes, and [head] the layers; remove it",
    "progress": "remove it",
    "weights": "set weights = 'imagenet', or a file, at the top of the recipe",
}
"""Builder options without effect on a body -> remedy in the error message."""


_Key = tuple[str, str, int]

_GROUPS_AND_WIDTH: Final[dict[_Key, tuple[tuple[int, ...], int]]] = {}
"""Layer groups and output width of the bodies that were built in this process."""

_FITTING_SIZES: Final[set[tuple[str, str, int, int]]] = set()
"""The bodies that were built in this process, and the image sizes that they support."""


def _key(body: nn.Sequential, arch: str, arch_args: Mapping[str, Any]) -> _Key:
    """Return what decides the shapes of a body's outputs: architecture, options and weights."""
    shapes = tuple((name, value.shape) for name, value in body.state_dict().items())
    return arch, repr(arch_args), hash(shapes)


def _supports_size(body: nn.Sequential, size: int) -> bool:
    try:
        return all(0 not in x.shape for x in meta_outputs(body, size))
    except RuntimeError:
        return False


def _split_groups(
    body: nn.Sequential, arch: str, arch_args: Mapping[str, Any], family: Family
) -> Backbone:
    """Determine layer groups and output width by a forward pass on the meta device.

    The pass is done once for each architecture and set of options.
    """
    key = _key(body, arch, arch_args)
    if key in _GROUPS_AND_WIDTH:
        return Backbone(body, *_GROUPS_AND_WIDTH[key], family.pooled)
    maps = list(meta_outputs(body, family.image_size(arch_args)))
    has_parameters = [any(True for _ in child.parameters()) for child in body]
    if family.side:
        sides = [x.shape[family.side] for x in maps]
        # Smaller drops come from unpadded convolutions, as in Inception.
        starts = [i for i in range(1, len(sides)) if sides[i] < 0.7 * sides[i - 1]]
    else:
        blocks = sum(has_parameters) - 2  # without patch embedding and final norm
        starts = [1 + blocks * quarter // 4 for quarter in range(4)]
    # A pooling layer has no parameters and is therefore no group. It joins the next group, or the
    # previous group at the end of the body (VGG, AlexNet).
    groups = [0]
    for start in starts:
        if any(has_parameters[groups[-1] : start]) and any(has_parameters[start:]):
            groups.append(start)
    _GROUPS_AND_WIDTH[key] = tuple(groups), maps[-1].shape[1]
    return Backbone(body, *_GROUPS_AND_WIDTH[key], family.pooled)
