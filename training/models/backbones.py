"""torchvision architectures -> a body that is one flat Sequential, cut into ordered layer groups.

A new layer group begins wherever the resolution falls, which reproduces the usual hand-made cuts
(ResNet's layer1 to layer4, MobileNetV2's features at 2, 4, 7 and 14) without a table of them. In a
ViT, where it never falls, the blocks are cut into quarters.
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
from training.models import families as bodies
from training.models import weights
from training.models.families import Family


@dataclass(frozen=True)
class Backbone:
    """A body without its classifier.

    body: float32 [N, 3, H, W] -> [N, width, h, w], or [N, width] where it pools by itself; a flat
        Sequential.
    groups: for each layer group the index of its first child of `body`, ascending from 0.
    width: channels of the output.
    pooled: how the body pools by itself; "" where it does not.
    """

    body: nn.Sequential
    groups: tuple[int, ...]
    width: int
    pooled: str = ""


def names() -> list[str]:
    """Every architecture that can be built here."""
    known = torchvision.models.list_models(module=torchvision.models)
    return [name for name in known if bodies.family(name) is not None]


def build(arch: str, arch_args: Mapping[str, Any], given: str = "none") -> Backbone:
    """Build a body, with weights if asked.

    Args:
        arch: A name from `names()`.
        arch_args: Options of torchvision's builder, such as `width_mult`.
        given: Weights: "none"; "imagenet", by torchvision's own cached download; or a path to a
            state dict of the whole torchvision network (its classifier may be missing).

    Raises:
        OptionError: Unknown architecture or option.
        DataError: Weights that can't be had, or that belong to another architecture.
    """
    family = family_of(arch)
    network = _network(arch, arch_args, family)
    body = _body(network, arch, arch_args, family)
    if given != "none":
        state = weights.read(arch, given, family.image_size(arch_args))
        weights.load(body, network, state, family, arch, given)
    return _cut(body, family, arch_args)


def build_on_meta(arch: str, arch_args: Mapping[str, Any]) -> Backbone:
    """As `build`, on the meta device: shapes without numbers, in no time; errors likewise."""
    family = family_of(arch)
    with _ShapesOnly():
        network = _network(arch, arch_args, family)
    return _cut(_body(network, arch, arch_args, family).to("meta"), family, arch_args)


def check_size(
    arch: str, arch_args: Mapping[str, Any], size: int, option: str = "preprocess.size"
) -> None:
    """Refuse a size of images that the architecture can't take.

    Args:
        arch: As `build`.
        arch_args: As `build`.
        size: Side in pixels.
        option: What the error names.

    Raises:
        OptionError: It does not fit; names one that does.
    """
    family = family_of(arch)
    made_for = family.image_size(arch_args)
    wrong = f"{option} = {size} does not fit {arch}: "
    if family.size_option:
        if size != made_for:
            change = f"arch_args.{family.size_option} changes it"
            change += f": {family.sizes}" if family.sizes else ""
            raise OptionError(f"{wrong}use {made_for} ({change})")
        return
    body = build_on_meta(arch, arch_args).body
    if _takes(body, size):
        return
    low, high = size, made_for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _takes(body, middle) else (middle, high)
    raise OptionError(f"{wrong}use {high} or more")


def outputs(body: nn.Sequential, size: int) -> Iterator[Tensor]:
    """What each child gives for one image [1, 3, size, size]: meta tensors, nothing is computed."""
    x = torch.empty(1, 3, size, size, device="meta")
    training = {module: module.training for module in body.modules()}
    body.eval()
    try:
        for child in body:
            shadow = {name: tensor.to("meta") for name, tensor in child.state_dict().items()}
            with torch.no_grad(), _ShapesOnly():
                x = torch.func.functional_call(child, shadow, x)
            yield x
    finally:
        for module, mode in training.items():
            module.training = mode


def family_of(arch: str) -> Family:
    """The family of an architecture.

    Raises:
        OptionError: There is none of that name.
    """
    family = bodies.family(arch)
    if family is None or arch not in names():
        near = difflib.get_close_matches(arch, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fledge layers` lists them all"
        raise OptionError(f"arch = {arch!r} is unknown: {hint}")
    return family


class _ShapesOnly(TorchFunctionMode):
    """Builds and runs networks on the meta device, and leaves out what changes no shape.

    `with torch.device("meta")` would also take the small tensors that RegNet computes its widths
    with, and is ten times slower.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:  # what weights are made of
            kwargs["device"] = "meta"
        elif func in _SAME_SHAPE or (func.__name__ in _FILLS and args and args[0].is_meta):
            return args[0]
        return func(*args, **kwargs)


_SAME_SHAPE: Final = {
    nn.functional.batch_norm,
    nn.functional.layer_norm,
    nn.functional.relu,
    nn.functional.relu6,
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.hardswish,
    nn.functional.hardsigmoid,
}
_FILLS: Final = ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")


def _network(arch: str, arch_args: Mapping[str, Any], family: Family) -> nn.Module:
    for name in arch_args:
        if name in family.fixed or name in _ELSEWHERE:
            remedy = _ELSEWHERE.get(name, "leave it out")
            raise OptionError(f"arch_args.{name} is not to be set for {arch}: {remedy}")
    try:
        network: nn.Module = torchvision.models.get_model(
            arch, weights=None, **arch_args, **family.fixed
        )
    except Exception as error:  # builders check their options in many ways
        reason = str(error).partition("\n")[0]
        if family.sizes and family.size_option in arch_args:
            reason = f"{reason}; use {family.sizes}"
        raise OptionError(
            f"arch_args = {dict(arch_args)!r} does not fit {arch}: {reason}"
        ) from None
    # Some classes take any option and pass over those that they don't know.
    takes = inspect.signature(type(network)).parameters
    swallows = any(one.kind is one.VAR_KEYWORD for one in takes.values())
    for name in arch_args:
        if swallows and name not in (*takes, *family.options):
            raise OptionError(f"arch_args.{name}: {arch} has no such option; leave it out")
    return network


def _body(
    network: nn.Module, arch: str, arch_args: Mapping[str, Any], family: Family
) -> nn.Sequential:
    body = family.body(network)
    if "dropout" in arch_args and not any(isinstance(m, nn.Dropout) for m in body.modules()):
        raise OptionError(f"arch_args.dropout is of {arch}'s own head: set head.dropout instead")
    return body


_ELSEWHERE: Final = {
    "num_classes": "the photos' classes decide, and [head]; leave it out",
    "progress": "leave it out",
    "weights": "set weights = 'imagenet', or a file, at the top of the recipe",
}
"""Options of every builder that have no effect on a body."""


def _takes(body: nn.Sequential, size: int) -> bool:
    try:
        return all(0 not in x.shape for x in outputs(body, size))
    except RuntimeError:
        return False


def _cut(body: nn.Sequential, family: Family, arch_args: Mapping[str, Any]) -> Backbone:
    """Layer groups and output width, by a run on the meta device."""
    maps = list(outputs(body, family.image_size(arch_args)))
    trains = [any(True for _ in child.parameters()) for child in body]
    if family.side:
        sides = [x.shape[family.side] for x in maps]
        # Convolutions without padding, as Inception's, take off a few pixels: that is no fall.
        starts = [i for i in range(1, len(sides)) if sides[i] < 0.7 * sides[i - 1]]
    else:
        blocks = sum(trains) - 2  # what makes tokens before them, and the norm behind
        starts = [1 + blocks * quarter // 4 for quarter in range(4)]
    # A bare pooling layer has nothing to train, so it is no group of its own: it joins the one
    # behind it, or at the end of the body (VGG, AlexNet) the one before.
    groups = [0]
    for start in starts:
        if any(trains[groups[-1] : start]) and any(trains[start:]):
            groups.append(start)
    return Backbone(body, tuple(groups), maps[-1].shape[1], family.pooled)
