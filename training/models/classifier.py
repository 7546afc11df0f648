"""The classifier: a torchvision body, pooling and a new head; it applies freezing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from serving.imaging.preprocess import Preprocess
from training.config.schema import Stage
from training.config.sections import HeadConfig
from training.models import backbones, freezing, heads
from training.models.freezing import Freezing
from training.utils.device import constant


class Classifier(nn.Module):
    """body -> pool -> head. `freeze` sets which parameters train."""

    def __init__(
        self, body: nn.Sequential, groups: tuple[int, ...], pool: nn.Module, head: nn.Sequential
    ) -> None:
        """groups: as in `Backbone`. All parameters train until `freeze` is called."""
        super().__init__()
        self.body, self.pool, self.head = body, pool, head
        self.groups = groups
        self.freeze(len(groups), batchnorm="train")

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> the head's input [N, D]."""
        pooled: Tensor = self.pool(self.body(images))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> logits [N, classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def freeze(
        self,
        unfreeze: int | Sequence[str],
        *,
        batchnorm: Literal["fixed", "train"] = "fixed",
        frozen_batchnorm: Literal["eval", "stats", "train"] = "eval",
    ) -> None:
        """Freeze the body but for `unfreeze`; the head always trains.

        Replaces any earlier freezing. Takes the arguments of `freezing.plan_freezing`, and raises
        what it raises.
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
        """Which parameters `stage` trains and which modules it freezes.

        The network is not changed. Raises what `freezing.plan_freezing` raises.
        """
        return freezing.plan_freezing(
            self.body,
            self.groups,
            stage.unfreeze,
            batchnorm=stage.batchnorm,
            frozen_batchnorm=stage.frozen_batchnorm,
        )

    def freeze_for(self, stage: Stage) -> None:
        """Freeze the network as `freezing_for(stage)` plans it, and raise what that raises."""
        self._set_freezing(self.freezing_for(stage))

    def _set_freezing(self, decided: Freezing) -> None:
        self.freezing = decided
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name in self.freezing.trainable)
            if name not in self.freezing.trainable:
                parameter.grad = None
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode like `nn.Module.train`; `freezing.eval_modules` stay in eval mode."""
        super().train(mode)
        for name, module in self.body.named_modules():
            if name in self.freezing.eval_modules:
                module.training = False
        return self

    def trainable_groups(
        self, freezing: Freezing | None = None
    ) -> list[tuple[str, list[nn.Parameter]]]:
        """(name, parameters that train) of each layer group, deepest first, "head" last.

        Groups in which nothing trains are left out. Names are those of the body's children, such
        as "layer4" or "14..18".

        Args:
            freezing: Result of `freezing_for`; default: the current freezing.
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
        """The frozen layers, a function without state: images [N, 3, H, W] -> feature map.

        If the whole body is frozen, the prefix includes the pooling, and its output is [N, D].
        """
        pool = [self.pool] if self.freezing.prefix == len(self.body) else []
        return nn.Sequential(*self.body[: self.freezing.prefix], *pool)

    @property
    def suffix(self) -> nn.Sequential:
        """The layers after the prefix: output of the prefix -> logits. Modules are not copied."""
        pool = [] if self.freezing.prefix == len(self.body) else [self.pool]
        return nn.Sequential(*self.body[self.freezing.prefix :], *pool, self.head)


def name_range(names: Iterable[str]) -> str:
    """The first and last name: "14..18"; a single name as it is."""
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
    """Build a classifier. For the arguments see `backbones.build` and `HeadConfig`.

    Raises what `backbones.build` and `heads.build_pool` raise.
    """
    config = head if isinstance(head, HeadConfig) else HeadConfig(**(head or {}))
    pool = heads.build_pool(config, arch, backbones.family_of(arch).pooled)
    backbone = backbones.build(arch, arch_args or {}, weights)
    layers = heads.build(config, backbone.width, classes)
    return Classifier(backbone.body, backbone.groups, pool, layers)


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Pixels uint8 [N, H, W, 3] -> float32 [N, 3, H, W], channels-last.

    (x / 255 - mean) / std per channel, as in exported graphs.
    """
    mean = constant(preprocess.mean, pixels.device) * 255
    std = constant(preprocess.std, pixels.device) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
