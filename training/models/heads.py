"""What stands on a body: pooling, and the layers that end in the logits."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from serving.errors import OptionError
from training.config.sections import HeadConfig


@fx.wrap  # no part of an exported or folded graph
def keep_layout(x: Tensor) -> Tensor:
    """The same map, whose gradient will lie in memory as the map itself does.

    The gradient of a mean is one value seen everywhere, which lies like no map: behind it BatchNorm
    works on in the slow layout. On MobileNetV2's last four blocks that is a quarter of a step.
    """
    if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return x


class ConcatPool(nn.Module):
    """Average and max pooling side by side: [N, C, h, w] -> [N, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole map."""
        x = keep_layout(x)
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


class AvgPool(nn.Module):
    """Average pooling: [N, C, h, w] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole map."""
        return keep_layout(x).mean(dim=(2, 3))


def build(config: HeadConfig, width: int, classes: int) -> nn.Sequential:
    """The layers: pooled features [N, D] -> logits [N, classes], D as `pooling` makes it.

    Args:
        config: As `HeadConfig` says.
        width: Channels of the body's output; `concat_pool` takes twice as many.
        classes: Length of the logits.
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
    # The last Linear gives the logits: nothing stands behind it.
    return nn.Sequential(*layers[: -2 if config.kind == "deep" else -1])


def pooling(config: HeadConfig, arch: str, pooled: str) -> nn.Module:
    """What turns the body's output into the head's input.

    Args:
        config: Its kind decides.
        arch: For the error.
        pooled: How the body pools by itself; "" where it does not.

    Raises:
        OptionError: concat_pool on a body that gives no map.
    """
    if pooled and config.kind == "concat_pool":
        raise OptionError(f"{arch} pools by itself ({pooled}); use head.kind = 'linear' or 'deep'")
    if pooled:
        return nn.Identity()
    return ConcatPool() if config.kind == "concat_pool" else AvgPool()


def _dropouts(config: HeadConfig, hidden: tuple[int, ...]) -> tuple[float, ...]:
    """One before every Linear."""
    if isinstance(config.dropout, tuple):
        return config.dropout
    return (*[config.dropout / 2] * len(hidden), config.dropout)
