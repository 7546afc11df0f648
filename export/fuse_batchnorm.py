"""Fold every BatchNorm that algebra allows into the layer beside it.

In eval mode a BatchNorm is `x * scale + shift`, channel by channel. Behind a convolution or a
Linear it folds back into weight and bias; in front of a Linear, or of a convolution that pads
nothing in, it folds forward. What stands elsewhere (DenseNet's, behind a concatenation and before a
ReLU) stays as that one multiply-add. Sums are done in float64 and rounded once.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from serving.errors import WorkError

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

_IDLE_IN_EVAL: Final = (
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
    """What became of every BatchNorm.

    folded: its name -> the layer that took it.
    left: its name -> why none could; it is now one multiply-add, unless the reason says otherwise.
    """

    folded: dict[str, str]
    left: dict[str, str]

    @property
    def before(self) -> int:
        """How many BatchNorms the network had."""
        return len(self.folded) + len(self.left)

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"before": self.before, "folded": len(self.folded), "left": dict(self.left)}


class Affine(nn.Module):
    """One multiply-add a channel: what is left of a BatchNorm that no layer can take."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        """Take scale [C] and shift [C]."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift x [N, C, ...]."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


def fuse(model: nn.Module) -> tuple[fx.GraphModule, FusionReport]:
    """Fold the BatchNorms of a copy of `model`; the model itself is not touched.

    Args:
        model: A network that torch.fx can trace, of any floating dtype. Beside a Linear, a
            BatchNorm1d is taken to work on rows [N, C].

    Returns:
        The same function of the same inputs in eval mode, and what happened to each BatchNorm.

    Raises:
        WorkError: The network can't be traced.
    """
    model = copy.deepcopy(model).eval()
    try:
        traced = fx.symbolic_trace(model)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise WorkError(f"{type(model).__name__} can't be traced for export: {reason}") from error
    _drop_idle(traced)
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    report = FusionReport({}, {})
    for node in list(traced.graph.nodes):
        norm = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(norm, _BatchNorm):
            _fold(traced, node, norm, uses, report)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced, report


def _fold(
    traced: fx.GraphModule,
    node: fx.Node,
    norm: _BatchNorm,
    uses: Counter[Any],
    report: FusionReport,
) -> None:
    """Deal with one call of one BatchNorm: change the graph, and say so in `report`."""
    name, source = str(node.target), node.all_input_nodes[0]
    if norm.running_mean is None or norm.running_var is None:
        report.left[name] = "keeps no running statistics; still a BatchNorm"
        return
    scale, shift = _scale_and_shift(norm)
    taker = None
    if uses[node.target] == 1:
        before = _layer(traced, source, uses) if len(source.users) == 1 else None
        after = _layer(traced, next(iter(node.users)), uses) if len(node.users) == 1 else None
        if before and _fold_back(traced.get_submodule(before), norm, scale, shift):
            taker = before
        elif after and _fold_forward(traced.get_submodule(after), norm, scale, shift):
            taker = after
    if taker:
        report.folded[name] = taker
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    else:
        report.left[name] = _neighbours(traced, node)
        dtype = norm.running_mean.dtype
        traced.set_submodule(name, Affine(scale.to(dtype), shift.to(dtype)))


def _drop_idle(traced: fx.GraphModule) -> None:
    """Take dropouts and identities out, so that neighbours are neighbours."""
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        if isinstance(traced.get_submodule(str(node.target)), _IDLE_IN_EVAL):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The BatchNorm as scale [C] and shift [C], float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _layer(traced: fx.GraphModule, node: fx.Node, uses: Counter[Any]) -> str | None:
    """The name of the module that `node` calls, when it is called nowhere else."""
    alone = node.op == "call_module" and uses[node.target] == 1
    return str(node.target) if alone else None


def _fold_back(layer: nn.Module, norm: _BatchNorm, scale: Tensor, shift: Tensor) -> bool:
    """Where the layer stands before: scale its rows. False where it is of another kind."""
    if not isinstance(layer, Conv | nn.Linear):
        return False
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear) and not _on_rows(norm, weight.shape[0]):
        return False
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    _set(layer, weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias)
    return True


def _fold_forward(layer: nn.Module, norm: _BatchNorm, scale: Tensor, shift: Tensor) -> bool:
    """Where it stands behind: scale its columns. False where padding or its kind forbids it."""
    if isinstance(layer, nn.Linear) and _on_rows(norm, layer.in_features):
        groups = 1
    elif isinstance(layer, Conv) and _pads_nothing_in(layer):
        groups = layer.groups
    else:
        return False
    weight = layer.weight.detach().double()
    rows, columns = weight.shape[:2]  # columns: input channels of one group
    tail = [1] * (weight.dim() - 2)
    taps = weight.flatten(2).sum(2) if tail else weight
    # Row r reads the input channels of its own group.
    per_row = scale.reshape(groups, columns).repeat_interleave(rows // groups, 0)
    shifts = shift.reshape(groups, columns).repeat_interleave(rows // groups, 0)
    bias = (taps * shifts).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    _set(layer, weight * per_row.reshape(rows, columns, *tail), bias)
    return True


def _on_rows(norm: _BatchNorm, width: int) -> bool:
    """Whether it normalises the axis that a Linear works on."""
    return isinstance(norm, nn.BatchNorm1d) and norm.num_features == width


def _pads_nothing_in(layer: Conv) -> bool:
    """Zeros put in after the BatchNorm would have to become -shift/scale; copies of pixels not."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return True
    return not isinstance(layer.padding, str) and not any(layer.padding)


def _set(layer: Conv | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _neighbours(traced: fx.GraphModule, node: fx.Node) -> str:
    """What stands around a BatchNorm that stays: "between cat and ReLU"."""

    def kind(other: fx.Node) -> str:
        if other.op == "call_module":
            return type(traced.get_submodule(str(other.target))).__name__
        return getattr(other.target, "__name__", str(other.target))

    users = " and ".join(kind(user) for user in node.users)
    return f"between {kind(node.all_input_nodes[0])} and {users or 'nothing'}"
