"""Optimizers with a learning rate per layer group, three kinds of weight decay, and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from serving.errors import OptionError
from training.config.schema import Spread, Stage
from training.config.sections import OptimizerConfig
from training.models.classifier import Classifier
from training.optim.schedules import SchedulePoint

Rates = float | tuple[float, ...] | Spread
LayerGroup = tuple[str, list[nn.Parameter]]
"""(name, trainable parameters of the layer group)."""


def build_optimizer(
    classifier: Classifier, config: OptimizerConfig, stage: Stage, lr: Rates
) -> optim.Optimizer:
    """An optimiser over the trainable parameters: the deepest layer group first, the head last.

    Each parameter group has its layer group's `name`, its `base_lr`, and `decays`. A layer group
    becomes two parameter groups, the second with norms and biases, unless one would be empty.

    Args:
        classifier: The network, frozen for the stage.
        config: Kind, momentum and weight decay are used.
        stage: Its name, `lr_divide` and `groups` are used.
        lr: Learning rates as in `group_rates`: the stage's own, or the rate that lr_find picked.

    Raises:
        OptionError: Raised by `check_rates` and `layer_groups`.
    """
    layers = layer_groups(classifier.trainable_groups(), stage)
    check_rates(layers, stage, lr)
    decoupled = config.kind == "adamw" or config.decay == "decoupled"
    vectors = set() if config.decay_norms else norms_and_biases(classifier)
    groups = []
    for (name, parameters), rate in zip(
        layers, group_rates(len(layers), lr, stage.lr_divide), strict=True
    ):
        for decays in (True, False):
            chosen = [p for p in parameters if (p not in vectors) == decays]
            decay = config.weight_decay if decays else 0.0
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": name,
                        "lr": rate,
                        "base_lr": rate,
                        "decays": decays,
                        "weight_decay": 0.0 if config.kind == "sgd" and decoupled else decay,
                        "decoupled_decay": decay if config.kind == "sgd" and decoupled else 0.0,
                    }
                )
    if config.kind == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, fused=True)
    kind = optim.AdamW if decoupled else optim.Adam
    return kind(groups, betas=(config.momentum, 0.999), fused=True)


def group_rates(count: int, lr: Rates, lr_divide: float) -> list[float]:
    """The learning rate of each of `count` layer groups, deepest first.

    A number is the head's rate; each deeper group has the next group's rate divided by `lr_divide`
    (Howard & Ruder, 2018, section 3.2). A tuple has all rates. A `Spread` goes from `low` to `high`
    in equal factors; a single group has `high`.
    """
    if isinstance(lr, tuple):
        return list(lr)
    if isinstance(lr, Spread):
        ratio = lr.low / lr.high
        depths = reversed(range(count))
        return [lr.high * ratio ** (depth / max(count - 1, 1)) for depth in depths]
    return [lr / lr_divide**depth for depth in reversed(range(count))]


def check_rates(layers: Sequence[LayerGroup], stage: Stage, lr: Rates) -> None:
    """Check that a list of rates has one for each layer group.

    Raises:
        OptionError: The list has more or fewer rates; the message names the groups.
    """
    if isinstance(lr, tuple) and len(lr) != len(layers):
        raise OptionError(
            f"stage {stage.name}: lr has {len(lr)} rates, but {len(layers)} groups train "
            f"({', '.join(name for name, _ in layers)}): give {len(layers)}, or merge them by "
            f"stage.{stage.name}.groups = {len(lr)}"
        )


def layer_groups(layers: list[LayerGroup], stage: Stage) -> list[LayerGroup]:
    """Merge `layers`, the result of `Classifier.trainable_groups`, into `stage.groups` groups.

    The body's groups are split into `groups - 1` runs of neighbours, as even as possible, longer
    runs first; the head is a group of its own. With `groups = 1` all parameters form one group.

    Raises:
        OptionError: `stage.groups` is more than the number of trainable groups.
    """
    wanted, names = stage.groups, [name for name, _ in layers]
    if wanted > len(layers):
        raise OptionError(
            f"stage {stage.name}: groups = {wanted}, but only {len(layers)} train "
            f"({', '.join(names)}): unfreeze more, or set stage.{stage.name}.groups = 0"
        )
    if wanted == 0:
        return layers
    if wanted == 1:
        return [_merge(layers)]
    runs = np.array_split(np.arange(len(layers) - 1), wanted - 1)
    return [*(_merge([layers[i] for i in run]) for run in runs), layers[-1]]


def norms_and_biases(module: nn.Module) -> set[nn.Parameter]:
    """Parameters without weight decay: norms, biases, and other vectors (ConvNeXt's layer scale).

    Tables of relative position biases (Swin, MaxViT) are recognised by their name.
    """
    return {
        parameter
        for name, parameter in module.named_parameters()
        if parameter.squeeze().ndim <= 1 or "bias" in name.rpartition(".")[2]
    }


def current_rates(optimizer: optim.Optimizer) -> dict[str, float]:
    """The current learning rate of each layer group, deepest first."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def set_lr_factor(optimizer: optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `base_lr * factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def apply_schedule(optimizer: optim.Optimizer, point: SchedulePoint) -> None:
    """Set every group's learning rate, and momentum (Adam's first beta) if the schedule has one."""
    set_lr_factor(optimizer, point.factor)
    if point.momentum is None:
        return
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (point.momentum, group["betas"][1])
        else:
            group["momentum"] = point.momentum


@torch.no_grad()
def optimizer_step(optimizer: optim.Optimizer, config: OptimizerConfig) -> None:
    """Update the weights by their gradients, and reset the gradients.

    In this order: L1 adds l1 * sign(weight) to the gradients of parameters that decay; the norm of
    all gradients together is clipped (Pascanu et al., 2013, "On the difficulty of training
    recurrent neural networks"); decoupled decay multiplies the weights of sgd by 1 - lr * decay
    (Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization", algorithm 1); the optimiser
    steps.
    """
    for group in optimizer.param_groups:
        if config.l1 and group["decays"]:
            for parameter in _with_gradient(group):
                assert parameter.grad is not None
                parameter.grad.add_(parameter.sign(), alpha=config.l1)
    if config.clip_norm:
        parameters = [p for group in optimizer.param_groups for p in _with_gradient(group)]
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    for group in optimizer.param_groups:
        parameters = _with_gradient(group)
        # A single call for all parameters, because on a GPU a call takes longer than arithmetic.
        if group["decoupled_decay"] and parameters:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["decoupled_decay"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _merge(layers: list[LayerGroup]) -> LayerGroup:
    first, last = layers[0][0].partition("..")[0], layers[-1][0].rpartition("..")[2]
    name = first if first == last else f"{first}..{last}"
    return name, [parameter for _, parameters in layers for parameter in parameters]
