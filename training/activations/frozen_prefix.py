"""The prefix of a network, its frozen layers: a faster copy of it, and a digest for cache keys."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from typing import Final

import torch
import torchvision
from torch import Tensor, fx, nn

from serving.errors import WorkError
from training.models.freezing import has_batchnorm
from training.models.fuse_batchnorm import fuse

_ACTIVATIONS: Final[dict[type[nn.Module], str]] = {
    nn.ReLU: "relu",
    nn.ReLU6: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.SiLU: "swish",
}
"""Activations that oneDNN computes together with the preceding convolution -> oneDNN's names."""

FUSE_VERSION: Final = 2
"""Part of the cache key. Increase it when a change of `fused` makes outputs round differently."""


def fused(prefix: nn.Module) -> nn.Module:
    """A copy with its BatchNorms folded into the layers before them, if torch.fx can trace it.

    On a CPU, convolutions are also joined with the activations that follow, because writing and
    reading a feature map takes longer than clamping it. This makes MobileNetV2 a fifth faster.

    Args:
        prefix: A network without state, all of it in eval mode.

    Returns:
        A network whose outputs equal those of `prefix` at its current weights, except for rounding.
        It is channels-last, in eval mode and without gradients. Without a BatchNorm, or if torch.fx
        can't trace it, `prefix` itself.
    """
    if not has_batchnorm(prefix):
        return prefix
    try:
        # In the weights' dtype, so that activations, losses and trained weights keep the bits of
        # earlier versions. A BatchNorm that can't be folded stays a BatchNorm, because in eager
        # mode it takes one pass over the feature map, and a multiply-add takes two.
        folded, _ = fuse(prefix, dtype=None, into_previous_only=True)
    except WorkError:
        return prefix
    if _can_join_activations(folded):
        _join_activations(folded)
    return folded.requires_grad_(False).to(memory_format=torch.channels_last)


class ConvActivation(nn.Module):
    """A convolution and its activation in one pass over the feature map.

    Works only on CPUs and without gradients. Calls the operator that `torch.compile` generates for
    the two layers.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        """Share the weights of `conv`; `activation` is one of `_ACTIVATIONS`."""
        super().__init__()
        self.conv, self.activation = conv, activation
        self.kind = _ACTIVATIONS[type(activation)]
        is_clamp = isinstance(activation, nn.ReLU6)
        self.limits = [activation.min_val, activation.max_val] if is_clamp else []

    def forward(self, x: Tensor) -> Tensor:
        """Feature map [N, C, h, w] -> [N, D, h', w']; under autocast, in autocast's dtype."""
        conv, dtype = self.conv, self.conv.weight.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if dtype == torch.bfloat16 and not _onednn_has_bf16():
            separate: Tensor = self.activation(self.conv(x))
            return separate
        joined: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(dtype),
            conv.weight.to(dtype),
            None if conv.bias is None else conv.bias.to(dtype),
            conv.padding,
            conv.stride,
            conv.dilation,
            conv.groups,
            self.kind,
            self.limits,
            "",
        )
        return joined


@cache
def _onednn_has_bf16() -> bool:
    """Whether oneDNN computes bfloat16 on this CPU; elsewhere its operator raises."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_join_activations(network: nn.Module) -> bool:
    """Whether the network is on a CPU and this build of torch has oneDNN's joined operator."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in network.parameters())
    has_operator = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    )
    return on_cpu and has_operator


def _join_activations(network: fx.GraphModule) -> None:
    """Replace each convolution whose only reader is an activation by a `ConvActivation`."""
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in list(network.graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node):
            continue
        activation, conv = modules[str(node.target)], modules.get(str(before.target))
        if (
            type(activation) in _ACTIVATIONS
            and before.op == "call_module"
            and type(conv) is nn.Conv2d
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and len(before.users) == calls[before.target] == 1
        ):
            network.set_submodule(str(before.target), ConvActivation(conv, activation))
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
    network.recompile()


def digest(prefix: nn.Module) -> bytes:
    """Hash of everything that determines a frozen network's outputs.

    That is its layers and weights, and the versions, thread count and CPU that compute them.
    """
    hashed = hashlib.sha256()
    machine = [FUSE_VERSION, torch.__version__, torchvision.__version__, torch.get_num_threads()]
    capability = torch.backends.cpu.get_cpu_capability()
    hashed.update(repr((repr(prefix), machine, capability)).encode())
    for name, value in prefix.state_dict().items():
        hashed.update(name.encode())
        hashed.update(_bytes(value))
    return hashed.digest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
