"""Pooling and classification heads."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from serving.errors import OptionError
from training.config.sections import HeadConfig


@fx.wrap  # a leaf for torch.fx, so graphs for export and fusion do not contain the hook
def keep_layout(x: Tensor) -> Tensor:
    """Identity whose gradient is made channels-last if `x` is.

    The gradient of a mean is an expanded tensor, not channels-last. Without this function the
    BatchNorm before the pooling would therefore compute its gradient in the slow memory format,
    which takes a quarter of a training step of the last four blocks of MobileNetV2.
    """
    if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return x


class ConcatPool(nn.Module):
    """Concatenated average and max pooling: [N, C, h, w] -> [N, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        x = keep_layout(x)
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


class AvgPool(nn.Module):
    """Average pooling: [N, C, h, w] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return keep_layout(x).mean(dim=(2, 3))


def build(config: HeadConfig, width: int, classes: int) -> nn.Sequential:
    """The head: pooled features [N, D] -> logits [N, classes].

    Args:
        config: Kind, hidden widths and dropout.
        width: Channels of the body's output; D is twice as large with `concat_pool`.
        classes: Number of logits.
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
    """The pooling between body and head.

    Args:
        config: Its `kind` selects the pooling.
        arch: Name of the architecture, for the error message.
        pooled: How the body pools by itself; "" if it does not.

    Raises:
        OptionError: concat_pool with a body that pools by itself.
    """
    if pooled and config.kind == "concat_pool":
        raise OptionError(f"{arch} pools by itself ({pooled}); use head.kind = 'linear' or 'deep'")
    if pooled:
        return nn.Identity()
    return ConcatPool() if config.kind == "concat_pool" else AvgPool()


def _dropouts(config: HeadConfig, hidden: tuple[int, ...]) -> tuple[float, ...]:
    """Dropout probability before each Linear."""
    if isinstance(config.dropout, tuple):
        return config.dropout
    return (*[config.dropout / 2] * len(hidden), config.dropout)
