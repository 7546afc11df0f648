"""The trained network: a torchvision body, pooling and a new head. Its layers can be frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from serving.imaging.preprocess import Preprocess
from training.config.schema import Stage
from training.config.sections import HeadConfig
from training.models import backbones, freezing, heads
from training.models.freezing import Freezing, Unfreeze
from training.utils.device import constant


class Classifier(nn.Module):
    """Image classifier: body, pooling and head. `freeze` sets which parameters train."""

    def __init__(
        self, body: nn.Sequential, groups: tuple[int, ...], pool: nn.Module, head: nn.Sequential
    ) -> None:
        """Assemble the network. All parameters train until `freeze` is called.

        Args:
            body: Layers of a torchvision network without classifier.
            groups: Index of the first child of each layer group of the body, ascending from 0.
            pool: Pooling between body and head.
            head: Layers from pooled features to logits.
        """
        super().__init__()
        self.body, self.pool, self.head = body, pool, head
        self.groups = groups
        self.freeze(len(groups), batchnorm="train")

    def features(self, images: Tensor) -> Tensor:
        """Compute the input of the head: normalised images [N, 3, H, W] -> features [N, D]."""
        pooled: Tensor = self.pool(self.body(images))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits: normalised images [N, 3, H, W] -> [N, classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def freeze(
        self,
        unfreeze: Unfreeze,
        *,
        batchnorm: Literal["fixed", "train"] = "fixed",
        frozen_batchnorm: Literal["eval", "stats", "train"] = "eval",
    ) -> None:
        """Freeze all layers of the body except `unfreeze`. The head always trains.

        Any earlier freezing is replaced. For the arguments see `freezing.plan_freezing`.

        Raises:
            OptionError: A pattern in `unfreeze` matches no parameter.
        """
        self._set_freezing(
            freezing.plan_freezing(
                self.body,
                self.groups,
                unfreeze,
                batchnorm=batchnorm,
                frozen_batchnorm=frozen_batchnorm,
            )
        )

    def freezing_for(self, stage: Stage) -> Freezing:
        """Determine which parameters `stage` trains and which modules stay in eval mode.

        The network is not changed.

        Raises:
            OptionError: A pattern in the stage's `unfreeze` matches no parameter.
        """
        return freezing.plan_freezing(
            self.body,
            self.groups,
            stage.unfreeze,
            batchnorm=stage.batchnorm,
            frozen_batchnorm=stage.frozen_batchnorm,
        )

    def freeze_for(self, stage: Stage) -> None:
        """Freeze the network for a stage.

        Raises:
            OptionError: A pattern in the stage's `unfreeze` matches no parameter.
        """
        self._set_freezing(self.freezing_for(stage))

    def _set_freezing(self, decided: Freezing) -> None:
        self.freezing = decided
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name in self.freezing.trainable)
            if name not in self.freezing.trainable:
                parameter.grad = None
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode like `nn.Module.train`, but keep `freezing.eval_modules` in eval mode."""
        super().train(mode)
        for name, module in self.body.named_modules():
            if name in self.freezing.eval_modules:
                module.training = False
        return self

    def trainable_groups(
        self, freezing: Freezing | None = None
    ) -> list[tuple[str, list[nn.Parameter]]]:
        """Return (name, trainable parameters) of each layer group, from the input to the head.

        Groups without trainable parameters are left out. A group is named after its children in
        the body, such as "layer4" or "14..18". The last group is "head".

        Args:
            freezing: Result of `freezing_for`; None: the current freezing of the network.
        """
        trains = (freezing or self.freezing).trainable
        children = list(self.body.named_children())
        found = []
        for start, end in pairwise((*self.groups, len(children))):
            parts = [(name, part) for name, part in children[start:end] if list(part.parameters())]
            parameters = [
                parameter
                for name, part in parts
                for own, parameter in part.named_parameters()
                if f"{name}.{own}" in trains
            ]
            if parameters:
                found.append((name_range(name for name, _ in parts), parameters))
        return [*found, ("head", list(self.head.parameters()))]

    @property
    def prefix(self) -> nn.Sequential:
        """Frozen layers at the start of the network: images [N, 3, H, W] -> feature map.

        If the whole body is frozen, the pooling is included, and the output is [N, D].
        """
        pool = [self.pool] if self.freezing.prefix == len(self.body) else []
        return nn.Sequential(*self.body[: self.freezing.prefix], *pool)

    @property
    def suffix(self) -> nn.Sequential:
        """Layers after the frozen layers: output of `prefix` -> logits. Modules are not copied."""
        pool = [] if self.freezing.prefix == len(self.body) else [self.pool]
        return nn.Sequential(*self.body[self.freezing.prefix :], *pool, self.head)


def name_range(names: Iterable[str]) -> str:
    """Join the first and last name, such as "14..18"; return a single name unchanged."""
    first, *rest = names
    return f"{first}..{rest[-1]}" if rest else first


def create_classifier(
    arch: str,
    classes: int,
    *,
    arch_args: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | HeadConfig | None = None,
    weights: str = "none",
) -> Classifier:
    """Build a classifier.

    Args:
        arch: Name of the torchvision architecture.
        classes: Number of classes.
        arch_args: Options of torchvision's builder, such as `width_mult`.
        head: Kind, hidden widths and dropout of the head; None: the defaults of `HeadConfig`.
        weights: "none", "imagenet", or the path of a state dict of the torchvision network.

    Raises:
        OptionError: The architecture or an option is unknown, or the head does not fit the body.
        DataError: The weights can't be read or downloaded, or belong to another architecture.
    """
    config = head if isinstance(head, HeadConfig) else HeadConfig(**(head or {}))
    pool = heads.build_pool(config, arch, backbones.family_of(arch).pooled)
    backbone = backbones.build(arch, arch_args or {}, weights)
    layers = heads.build(config, backbone.width, classes)
    return Classifier(backbone.body, backbone.groups, pool, layers)


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    arch: str,
    classes: int,
    *,
    arch_args: Mapping[str, Any],
    head: Mapping[str, Any],
) -> None:
    """Check that the tensors of a state dict fit a classifier, without building the classifier.

    The description of a classifier may come from others, and a few bytes of it can state layers of
    gigabytes. Therefore the classifier is built on the meta device, and only until it has more
    parameters than the state dict.

    Args:
        shapes: Shape of each tensor of the state dict, by name.
        arch: As for `create_classifier`; so are the following arguments.
        classes: Number of classes.
        arch_args: Options of the architecture.
        head: Options of the head.

    Raises:
        OptionError: The architecture or an option is unknown, or the head does not fit the body.
        RuntimeError: The tensors do not fit; the last line of the message names one.
    """
    config = HeadConfig(**head)
    pool = heads.build_pool(config, arch, backbones.family_of(arch).pooled)
    # The body is built with torchvision's classifier, which is not in the state dict.
    with _at_most(len(shapes) + _OWN_CLASSIFIER):
        backbone = backbones.build_on_meta(arch, arch_args)
        with backbones.ShapesOnly():
            layers = heads.build(config, backbone.width, classes).to("meta")
    classifier = Classifier(backbone.body, backbone.groups, pool, layers)
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    classifier.load_state_dict(state, assign=True)


_OWN_CLASSIFIER: Final = 100  # parameters of torchvision's classifiers, which `Backbone` leaves out


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Raise RuntimeError in the block when modules get more parameters than this number."""
    left = parameters

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError(f"it has more than the {parameters} parameters of the weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Normalise pixels: values 0..255, [N, H, W, 3] -> float32 [N, 3, H, W], channels-last.

    The formula is (x / 255 - mean) / std for each channel, as in exported graphs.
    """
    mean = constant(preprocess.mean, pixels.device) * 255
    std = constant(preprocess.std, pixels.device) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
