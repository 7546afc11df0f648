"""The classifier: a torchvision body, pooling, and a head of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from serving.preprocess import Preprocess
from training import backbones
from training.options import HeadConfig


class ConcatPool(nn.Module):
    """Average and max pooling side by side: [N, C, h, w] -> [N, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole map."""
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


class AvgPool(nn.Module):
    """Average pooling: [N, C, h, w] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole map."""
        return x.mean(dim=(2, 3))


class Classifier(nn.Module):
    """body -> pool -> head, with a frozen prefix of the body.

    The first `frozen` children of `body` neither train nor change: no gradients, and eval mode
    (BatchNorm, dropout, stochastic depth) that survives `.train()`. With `fixed_norms` every
    BatchNorm of the body keeps its statistics likewise, while its scale and shift still train.
    """

    def __init__(
        self, body: nn.Sequential, groups: tuple[int, ...], pool: nn.Module, head: nn.Sequential
    ) -> None:
        """Take the parts; `groups` as in `backbones.Backbone`."""
        super().__init__()
        self.body, self.pool, self.head = body, pool, head
        self.groups = groups
        self.frozen = 0
        self.fixed_norms = False

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> the head's input [N, D]."""
        pooled: Tensor = self.pool(self.body(images))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> logits [N, classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def freeze_to(self, unfrozen: int) -> None:
        """Train the head and the last `unfrozen` layer groups of the body; freeze the rest.

        More groups than there are means the whole network.
        """
        starts = (*self.groups, len(self.body))
        self.frozen = starts[max(len(self.groups) - unfrozen, 0)]
        for index, child in enumerate(self.body):
            child.requires_grad_(index >= self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """As usual, but what is frozen stays in eval mode."""
        super().train(mode)
        for child in self.body[: self.frozen]:
            child.eval()
        if self.fixed_norms:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @property
    def prefix(self) -> nn.Sequential:
        """What is frozen: images [N, 3, H, W] -> a feature map, a function without state.

        With the whole body frozen the pooling belongs to it: -> [N, D].
        """
        pool = [self.pool] if self.frozen == len(self.body) else []
        return nn.Sequential(*self.body[: self.frozen], *pool)

    @property
    def suffix(self) -> nn.Sequential:
        """What trains: the prefix's output -> logits. Shares its modules with this classifier."""
        pool = [] if self.frozen == len(self.body) else [self.pool]
        return nn.Sequential(*self.body[self.frozen :], *pool, self.head)


def build(
    arch: str,
    classes: int,
    *,
    arch_args: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | HeadConfig | None = None,
    weights: str = "none",
) -> Classifier:
    """Build a classifier; arguments and errors as in `backbones.build` and `HeadConfig`."""
    config = head if isinstance(head, HeadConfig) else HeadConfig(**(head or {}))
    backbone = backbones.build(arch, arch_args or {}, weights)
    pool, layers = _head(config, backbone.width, classes)
    return Classifier(backbone.body, backbone.groups, pool, layers)


def _head(config: HeadConfig, width: int, classes: int) -> tuple[nn.Module, nn.Sequential]:
    dropout = config.dropout if isinstance(config.dropout, float) else config.dropout[-1]
    hidden = config.hidden[0]
    if config.kind == "linear":
        return AvgPool(), nn.Sequential(nn.Dropout(dropout), nn.Linear(width, classes))
    head = nn.Sequential(
        nn.BatchNorm1d(2 * width),
        nn.Dropout(dropout / 2),
        nn.Linear(2 * width, hidden),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(hidden),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )
    return ConcatPool(), head


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Pixels uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in channels-last layout.

    (x / 255 - mean) / std per channel: what every exported graph does inside.
    """
    mean = torch.tensor(preprocess.mean, device=pixels.device) * 255
    std = torch.tensor(preprocess.std, device=pixels.device) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
