"""Pooling layers and classification heads: the layers between the body and the logits."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from serving.errors import OptionError
from training.config.sections import HeadConfig


@fx.wrap  # a leaf for torch.fx, so graphs for export and fusion do not contain the hook
def keep_layout(x: Tensor) -> Tensor:
    """Return `x` unchanged; if `x` is channels-last, make its gradient channels-last, too.

    The gradient of average pooling is an expanded tensor, which is not channels-last. Without this
    function, the BatchNorm before the pooling would run backward in a slow memory format. When the
    last four blocks of MobileNetV2 train, this would be a quarter of the time of a step.
    """
    if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return x


class ConcatPool(nn.Module):
    """Average pooling and max pooling, concatenated: [N, C, h, w] -> [N, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        x = keep_layout(x)
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


class AvgPool(nn.Module):
    """Average pooling: [N, C, h, w] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return keep_layout(x).mean(dim=(2, 3))


def build(config: HeadConfig, width: int, classes: int) -> nn.Sequential:
    """Build the head: pooled features [N, D] -> logits [N, classes].

    Args:
        config: Kind, hidden widths and dropout of the head.
        width: Number of channels of the body's output. D is `width`; for the kind "concat_pool",
            2 * `width`.
        classes: Number of classes.
    """
    hidden = () if config.kind == "linear" else config.hidden
    widths = (2 * width if config.kind == "concat_pool" else width, *hidden, classes)
    layers: list[nn.Module] = []
    for (before, after), dropout in zip(pairwise(widths), _dropouts(config, hidden), strict=True):
        if config.kind == "concat_pool":
            layers.append(nn.BatchNorm1d(before))
        layers += [nn.Dropout(dropout), nn.Linear(before, after)]
        if config.kind == "deep":
            layers.append(nn.BatchNorm1d(after))
        layers.append(nn.ReLU(inplace=True))
    # Remove what follows the last Linear, whose outputs are the logits.
    return nn.Sequential(*layers[: -2 if config.kind == "deep" else -1])


def build_pool(config: HeadConfig, arch: str, pooled: str) -> nn.Module:
    """Build the pooling between body and head.

    Args:
        config: Options of the head; `kind` selects the pooling.
        arch: Name of the architecture, for the error message.
        pooled: Name of the pooling that the body contains; "" if the body has none.

    Raises:
        OptionError: The head is "concat_pool", but the body contains a pooling.
    """
    if pooled and config.kind == "concat_pool":
        raise OptionError(f"{arch} pools by itself ({pooled}); use head.kind = 'linear' or 'deep'")
    if pooled:
        return nn.Identity()
    return ConcatPool() if config.kind == "concat_pool" else AvgPool()


def _dropouts(config: HeadConfig, hidden: tuple[int, ...]) -> tuple[float, ...]:
    """Return the dropout probability before each Linear of the head."""
    if isinstance(config.dropout, tuple):
        return config.dropout
    return (*[config.dropout / 2] * len(hidden), config.dropout)
