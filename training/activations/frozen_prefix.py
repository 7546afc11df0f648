"""The frozen part of a network: run faster than as it was trained, and known by what is in it."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from typing import Final

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.fx.experimental import optimization

from training.models.freezing import has_batchnorm

_ACTIVATIONS: Final[dict[type[nn.Module], str]] = {
    nn.ReLU: "relu",
    nn.ReLU6: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.SiLU: "swish",
}
"""What oneDNN computes in one pass with the convolution before it, and its name there."""

FOLDING: Final = 2
"""Counts the ways in which `fused` has computed: each rounds in its own."""


def fused(prefix: nn.Module) -> nn.Module:
    """A copy with its BatchNorms folded into the convolutions before them, where torch.fx can.

    On a CPU the activations behind them join them, too: to write a map and read it again takes
    longer than to clamp it. MobileNetV2 runs a fifth faster so.

    Args:
        prefix: A function without state: all of it in eval mode.

    Returns:
        Equal to `prefix` but for rounding, at the weights it has now; `prefix` itself where there
        is nothing to fold or torch.fx can't trace it.
    """
    if not has_batchnorm(prefix):
        return prefix
    try:
        folded = optimization.fuse(prefix)
    except Exception:  # whatever a network does that can't be traced: it runs as it is
        return prefix
    assert isinstance(folded, fx.GraphModule)
    if _one_pass_here(folded):
        _join_activations(folded)
    return folded.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class ConvActivation(nn.Module):
    """A convolution and its activation, in one pass over the map; on CPUs, and without gradients.

    It calls the operator that `torch.compile` calls for the two.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        """Share the weights of `conv`; `activation` is one of `_ACTIVATIONS`."""
        super().__init__()
        self.conv, self.activation = conv, activation
        self.kind = _ACTIVATIONS[type(activation)]
        is_clamp = isinstance(activation, nn.ReLU6)
        self.limits = [activation.min_val, activation.max_val] if is_clamp else []

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, h, w] -> [N, D, h', w'], under autocast in its dtype."""
        conv, dtype = self.conv, self.conv.weight.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if dtype == torch.bfloat16 and not _bf16_in_one_pass():
            apart: Tensor = self.activation(self.conv(x))
            return apart
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
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
        return made


@cache
def _bf16_in_one_pass() -> bool:
    """Whether oneDNN computes bfloat16 here; elsewhere its operator raises."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _one_pass_here(network: nn.Module) -> bool:
    """Whether oneDNN is what computes convolutions here, and has the operator."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in network.parameters())
    has = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    )
    return on_cpu and has


def _join_activations(network: fx.GraphModule) -> None:
    """Put a `ConvActivation` in the place of each convolution that only an activation reads."""
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
    """What decides the outputs of a frozen network: its layers, weights, and what computes them."""
    known = hashlib.sha256()
    machine = [FOLDING, torch.__version__, torchvision.__version__, torch.get_num_threads()]
    capability = torch.backends.cpu.get_cpu_capability()
    known.update(repr((repr(prefix), machine, capability)).encode())
    for name, value in prefix.state_dict().items():
        known.update(name.encode())
        known.update(_bytes(value))
    return known.digest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
