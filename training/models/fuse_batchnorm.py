"""Fold BatchNorms into neighbouring layers, for frozen layers in training and for exported graphs.

In eval mode a BatchNorm computes `x * scale + shift` for each channel. If the layer before it is a
convolution or a Linear, scale and shift are folded into the weight and bias of that layer.
Otherwise, if the layer after the BatchNorm is a Linear or a convolution without zero padding, scale
and shift are folded into that layer. Any other BatchNorm (in DenseNet: between a concatenation and
a ReLU) is replaced by one multiply-add, or stays a BatchNorm.
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
    """Result of the folding for every BatchNorm of a network.

    Attributes:
        folded: Name of each folded BatchNorm -> name of the layer that contains it now.
        left: Name of each BatchNorm that could not be folded -> reason. In a bundle, a multiply-add
            replaces the BatchNorm unless the reason says "still a BatchNorm".
    """

    folded: dict[str, str]
    left: dict[str, str]

    @property
    def before(self) -> int:
        """Number of BatchNorms before folding."""
        return len(self.folded) + len(self.left)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry `batchnorm` of the bundle's manifest."""
        return {"before": self.before, "folded": len(self.folded), "left": dict(self.left)}


class Affine(nn.Module):
    """Layer `x * scale + shift` for each channel. It replaces a BatchNorm that can't be folded."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        """Register scale [C] and shift [C] as buffers."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x * scale + shift` for x [N, C, ...]."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


def fuse(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = torch.float64,
    into_previous_only: bool = False,
) -> tuple[fx.GraphModule, FusionReport]:
    """Copy `model` and fold the BatchNorms of the copy.

    Args:
        model: A network that torch.fx can trace, of any floating-point dtype. The input of a
            BatchNorm1d next to a Linear is assumed to be [N, C].
        dtype: Dtype in which the folded weights are computed. They are then rounded to the dtype
            of `model`. None: the dtype of `model`; for float32 the results are then bit for bit
            those of `torch.fx.experimental.optimization.fuse`.
        into_previous_only: Fold a BatchNorm only into the layer before it. All other BatchNorms
            stay BatchNorms.

    Returns:
        The copy, in eval mode, and the result for each BatchNorm.

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
    """Fold one BatchNorm into a neighbouring layer.

    Returns the name of that layer; None if the BatchNorm can't be folded.
    """
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
    """Remove dropout and identity layers, which may separate a BatchNorm from its neighbour."""
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        if isinstance(traced.get_submodule(str(node.target)), _NO_OPS_IN_EVAL):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _statistics(norm: _BatchNorm, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Return running mean, running variance, weight (1 if None) and bias (0 if None), all [C]."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    return tuple(one.to(dtype or one.dtype) for one in (mean, var, weight, bias))


def _affine(norm: _BatchNorm, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return scale [C] and shift [C] that equal the BatchNorm in eval mode."""
    mean, var, weight, bias = _statistics(norm, dtype)
    scale = (var + norm.eps).rsqrt() * weight
    return scale, -mean * scale + bias


def _single_use_layer(traced: fx.GraphModule, node: fx.Node, uses: Counter[Any]) -> str | None:
    """Return the name of the module that `node` calls.

    The result is None if `node` calls no module, or if other nodes call the same module.
    """
    is_single = node.op == "call_module" and uses[node.target] == 1
    return str(node.target) if is_single else None


def _fold_into_previous(layer: nn.Module, norm: _BatchNorm, dtype: torch.dtype | None) -> bool:
    """Fold a BatchNorm into the layer before it. Return False if that layer's type forbids it."""
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
    """Fold a BatchNorm into the layer after it.

    Returns False if the type or the padding of that layer forbids folding.
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
    """Whether `norm` is a BatchNorm1d with `width` features.

    Only such a BatchNorm can be folded into a Linear whose inputs or outputs are [N, width].
    """
    return isinstance(norm, nn.BatchNorm1d) and norm.num_features == width


def _pads_with_zeros(layer: Conv) -> bool:
    """Whether a convolution pads with zeros.

    If it does, a BatchNorm before the convolution can't be folded into it: the padding is not
    normalised, but after folding it would be. Padding with pixels of the image ("reflect",
    "replicate", "circular") allows folding.
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
    """Return the layers around a BatchNorm in words, such as "between cat and ReLU"."""

    def kind(other: fx.Node) -> str:
        if other.op == "call_module":
            return type(traced.get_submodule(str(other.target))).__name__
        return getattr(other.target, "__name__", str(other.target))

    users = " and ".join(kind(user) for user in node.users)
    return f"between {kind(node.all_input_nodes[0])} and {users or 'nothing'}"
