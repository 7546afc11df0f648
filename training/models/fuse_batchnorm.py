"""Fold BatchNorms in eval mode into neighbouring layers; used by training and export.

In eval mode a BatchNorm computes `x * scale + shift` per channel. After a convolution or a Linear
it folds into that layer's weight and bias. Before a Linear, or before a convolution without zero
padding, it folds into the layer that follows. A BatchNorm in any other place (in DenseNet: after a
concatenation and before a ReLU) becomes one multiply-add, or stays as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from serving.errors import WorkError

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

_NO_OPS_IN_EVAL: Final = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class FusionReport:
    """The result for every BatchNorm of a network.

    folded: name of the BatchNorm -> name of the layer that it was folded into.
    left: name of the BatchNorm -> why it could not be folded. In a bundle each BatchNorm of `left`
        is one multiply-add, unless the reason says that it is still a BatchNorm.
    """

    folded: dict[str, str]
    left: dict[str, str]

    @property
    def before(self) -> int:
        """Number of BatchNorms before the fusion."""
        return len(self.folded) + len(self.left)

    def to_dict(self) -> dict[str, Any]:
        """The manifest's `batchnorm` entry."""
        return {"before": self.before, "folded": len(self.folded), "left": dict(self.left)}


class Affine(nn.Module):
    """One multiply-add per channel; replaces a BatchNorm that can't be folded."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        """Register scale [C] and shift [C] as buffers."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift x [N, C, ...]."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


def fuse(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = torch.float64,
    into_previous_only: bool = False,
) -> tuple[fx.GraphModule, FusionReport]:
    """Fold the BatchNorms of a copy of `model`; `model` itself does not change.

    Args:
        model: A network that torch.fx can trace, of any floating dtype. A BatchNorm1d next to a
            Linear is assumed to normalise rows [N, C].
        dtype: The weights are folded in this dtype and then rounded once to their own. None folds
            in their own dtype, which in float32 gives the same bits as
            `torch.fx.experimental.optimization.fuse`.
        into_previous_only: Fold a BatchNorm only into the layer before it; all other BatchNorms
            stay BatchNorms.

    Returns:
        The fused copy in eval mode, and the result for each BatchNorm.

    Raises:
        WorkError: torch.fx can't trace the network.
    """
    model = copy.deepcopy(model).eval()
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        reason = str(error).partition("\n")[0]
        raise WorkError(f"{type(model).__name__} can't be traced by torch.fx: {reason}") from error
    _remove_no_ops(traced)
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    report = FusionReport({}, {})
    for node in list(traced.graph.nodes):
        norm = traced.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm):
            continue
        if into_previous_only and isinstance(norm, nn.SyncBatchNorm):
            continue  # as `torch.fx.experimental.optimization.fuse`
        if norm.running_mean is None or norm.running_var is None:
            reason = "keeps no running statistics; still a BatchNorm"
            report.left[str(node.target)] = reason
        elif target := _fold(traced, node, norm, uses, dtype, into_previous_only):
            report.folded[str(node.target)] = target
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
        else:
            report.left[str(node.target)] = _neighbours(traced, node)
            if not into_previous_only:
                scale, shift = (one.to(norm.running_mean.dtype) for one in _affine(norm, dtype))
                traced.set_submodule(str(node.target), Affine(scale, shift))
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced, report


def _fold(
    traced: fx.GraphModule,
    node: fx.Node,
    norm: _BatchNorm,
    uses: Counter[Any],
    dtype: torch.dtype | None,
    into_previous_only: bool,
) -> str | None:
    """Fold one BatchNorm into a neighbouring layer; returns its name, None if none is suitable."""
    source = node.all_input_nodes[0]
    if uses[node.target] != 1:
        return None
    previous = _single_use_layer(traced, source, uses) if len(source.users) == 1 else None
    if previous and _fold_into_previous(traced.get_submodule(previous), norm, dtype):
        return previous
    if into_previous_only or len(node.users) != 1:
        return None
    following = _single_use_layer(traced, next(iter(node.users)), uses)
    if following and _fold_into_next(traced.get_submodule(following), norm, dtype):
        return following
    return None


def _remove_no_ops(traced: fx.GraphModule) -> None:
    """Remove dropouts and identities, so that a BatchNorm and its layer are adjacent nodes."""
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        if isinstance(traced.get_submodule(str(node.target)), _NO_OPS_IN_EVAL):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _statistics(norm: _BatchNorm, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Running mean, running variance, weight (default 1) and bias (default 0), each [C]."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    return tuple(one.to(dtype or one.dtype) for one in (mean, var, weight, bias))


def _affine(norm: _BatchNorm, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The BatchNorm as scale [C] and shift [C]."""
    mean, var, weight, bias = _statistics(norm, dtype)
    scale = (var + norm.eps).rsqrt() * weight
    return scale, -mean * scale + bias


def _single_use_layer(traced: fx.GraphModule, node: fx.Node, uses: Counter[Any]) -> str | None:
    """The name of the module that `node` calls, if no other node calls it."""
    is_single = node.op == "call_module" and uses[node.target] == 1
    return str(node.target) if is_single else None


def _fold_into_previous(layer: nn.Module, norm: _BatchNorm, dtype: torch.dtype | None) -> bool:
    """Fold a BatchNorm into the outputs of the layer before it; False if its kind forbids that."""
    if not isinstance(layer, Conv | nn.Linear):
        return False
    if isinstance(layer, nn.Linear) and not _normalises_rows(norm, layer.out_features):
        return False
    folded = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    mean, var, gain, offset = _statistics(norm, dtype)
    weight, bias = _weight_and_bias(layer, dtype)
    _set(layer, *folded(weight, bias, mean, var, norm.eps, gain, offset))
    return True


def _fold_into_next(layer: nn.Module, norm: _BatchNorm, dtype: torch.dtype | None) -> bool:
    """Fold a BatchNorm into the inputs of the layer after it.

    Returns False if the layer's kind or padding forbids it.
    """
    if isinstance(layer, nn.Linear) and _normalises_rows(norm, layer.in_features):
        groups = 1
    elif isinstance(layer, Conv) and not _pads_with_zeros(layer):
        groups = layer.groups
    else:
        return False
    scale, shift = _affine(norm, dtype)
    weight, own_bias = _weight_and_bias(layer, dtype)
    rows, columns = weight.shape[:2]  # columns: input channels of one group
    tail = [1] * (weight.dim() - 2)
    taps = weight.flatten(2).sum(2) if tail else weight
    # Row r reads the input channels of its own group.
    per_row = scale.reshape(groups, columns).repeat_interleave(rows // groups, 0)
    shifts = shift.reshape(groups, columns).repeat_interleave(rows // groups, 0)
    bias = (taps * shifts).sum(1)
    if own_bias is not None:
        bias = bias + own_bias
    _set(layer, weight * per_row.reshape(rows, columns, *tail), bias)
    return True


def _normalises_rows(norm: _BatchNorm, width: int) -> bool:
    """Whether the BatchNorm normalises the axis that a Linear of this width works on."""
    return isinstance(norm, nn.BatchNorm1d) and norm.num_features == width


def _pads_with_zeros(layer: Conv) -> bool:
    """Whether the layer pads with zeros, which forbids folding a BatchNorm before it into it.

    The BatchNorm does not shift these zeros, but the folded layer would. Padding that repeats
    pixels ("reflect", "replicate", "circular") does not forbid folding.
    """
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return isinstance(layer.padding, str) or any(layer.padding)


def _weight_and_bias(
    layer: Conv | nn.Linear, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    return weight.to(dtype or weight.dtype), None if bias is None else bias.to(dtype or bias.dtype)


def _set(layer: Conv | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _neighbours(traced: fx.GraphModule, node: fx.Node) -> str:
    """The nodes around a BatchNorm that stays: "between cat and ReLU"."""

    def kind(other: fx.Node) -> str:
        if other.op == "call_module":
            return type(traced.get_submodule(str(other.target))).__name__
        return getattr(other.target, "__name__", str(other.target))

    users = " and ".join(kind(user) for user in node.users)
    return f"between {kind(node.all_input_nodes[0])} and {users or 'nothing'}"
