"""A faster copy of a network's frozen layers, and a hash of these layers for cache keys.

The frozen layers are the first layers of the network, also called its prefix.
"""

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
"""oneDNN's names of the activations that it can compute together with the convolution before."""

FUSE_VERSION: Final = 2
"""Version number in the cache key. Increase it if a change of `fused` changes the rounding."""


def fused(prefix: nn.Module) -> nn.Module:
    """Return a faster copy of frozen layers: each BatchNorm is folded into the layer before it.

    On a CPU, convolutions are also joined with the activations that follow. This avoids writing and
    reading the feature map between the two layers, and makes MobileNetV2 a fifth faster.

    Args:
        prefix: The frozen layers, in eval mode.

    Returns:
        A network with the same outputs as `prefix`, except for rounding. The network is
        channels-last, in eval mode and without gradients. If `prefix` has no BatchNorm, or if
        torch.fx can't trace it, `prefix` itself is returned.
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
    """A convolution and the activation after it, computed in one pass over the feature map.

    Works only on CPUs and without gradients. The forward pass calls the oneDNN operator that
    `torch.compile` also uses for these two layers.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        """Use `conv` without copying its weights. The type of `activation` is in `_ACTIVATIONS`."""
        super().__init__()
        self.conv, self.activation = conv, activation
        self.kind = _ACTIVATIONS[type(activation)]
        is_clamp = isinstance(activation, nn.ReLU6)
        self.limits = [activation.min_val, activation.max_val] if is_clamp else []

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and activate: [N, C, h, w] -> [N, D, h', w']. Autocast sets the dtype."""
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
    """Whether oneDNN supports bfloat16 on this CPU. Without support, oneDNN's operator fails."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_join_activations(network: nn.Module) -> bool:
    """Whether the network is on a CPU and this build of torch has oneDNN's fused operator."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in network.parameters())
    has_operator = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    )
    return on_cpu and has_operator


def _join_activations(network: fx.GraphModule) -> None:
    """Replace each convolution by a `ConvActivation` if only an activation uses the output."""
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
    """Hash everything that determines the outputs of frozen layers.

    The hash covers the layers, the weights, the versions of torch and torchvision, the number of
    threads and the instruction set of the CPU.
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
