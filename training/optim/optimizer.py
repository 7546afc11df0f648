"""Create and step optimizers with a learning rate per layer group.

The optimizer step also does L1 decay, decoupled weight decay for SGD, and gradient clipping.
"""

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
"""Name and trainable parameters of a layer group."""


def build_optimizer(
    classifier: Classifier, config: OptimizerConfig, stage: Stage, lr: Rates
) -> optim.Optimizer:
    """Create the optimizer of a stage.

    Its parameter groups are ordered from the layer group next to the input to the head. A layer
    group becomes one or two parameter groups: parameters with weight decay, then parameters without
    (normalisation layers and biases). Each parameter group has three additional entries: `name` (of
    the layer group), `base_lr` (learning rate before the schedule) and `decays` (whether its
    parameters have weight decay).

    Args:
        classifier: The network, with layers frozen for the stage.
        config: Kind of optimizer, momentum and weight decay.
        stage: The stage, whose options `lr_divide` and `groups` are used.
        lr: Learning rates, as described in `group_rates`.

    Raises:
        OptionError: `lr` is a list with a wrong number of rates, or `stage.groups` is more than the
            number of trainable layer groups.
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
    """Return the learning rate of each layer group, from the group next to the input to the head.

    Args:
        count: Number of layer groups.
        lr: The rates, in one of three forms:

            - A number is the rate of the head. The group before the head has this rate divided by
              `lr_divide`, the group before that is divided again, and so on (Howard & Ruder, 2018,
              section 3.2).
            - A tuple has the rate of each group.
            - A `Spread` has the rates of the first group (`low`) and of the head (`high`). The
              rates in between are spaced geometrically.
        lr_divide: Divisor, used if `lr` is a number.
    """
    if isinstance(lr, tuple):
        return list(lr)
    if isinstance(lr, Spread):
        ratio = lr.low / lr.high
        depths = reversed(range(count))
        return [lr.high * ratio ** (depth / max(count - 1, 1)) for depth in depths]
    return [lr / lr_divide**depth for depth in reversed(range(count))]


def check_rates(layers: Sequence[LayerGroup], stage: Stage, lr: Rates) -> None:
    """Check that `lr`, if it is a tuple, has one learning rate for each layer group.

    Raises:
        OptionError: `lr` is a tuple with more or fewer rates; the message names the layer groups.
    """
    if isinstance(lr, tuple) and len(lr) != len(layers):
        raise OptionError(
            f"stage {stage.name}: lr has {len(lr)} rates, but {len(layers)} groups train "
            f"({', '.join(name for name, _ in layers)}): give {len(layers)}, or merge them by "
            f"stage.{stage.name}.groups={len(lr)}"
        )


def layer_groups(layers: list[LayerGroup], stage: Stage) -> list[LayerGroup]:
    """Merge neighbouring layer groups until `stage.groups` groups are left.

    The head stays a group of its own, unless `stage.groups` is 1. The groups of the body are merged
    as evenly as possible. If `stage.groups` is 0, nothing is merged.

    Args:
        layers: Layer groups from `Classifier.trainable_groups`; the head is last.
        stage: The stage.

    Raises:
        OptionError: `stage.groups` is more than the number of layer groups.
    """
    wanted, names = stage.groups, [name for name, _ in layers]
    if wanted > len(layers):
        raise OptionError(
            f"stage {stage.name}: groups = {wanted}, but only {len(layers)} train "
            f"({', '.join(names)}): unfreeze more, or set stage.{stage.name}.groups=0"
        )
    if wanted == 0:
        return layers
    if wanted == 1:
        return [_merge(layers)]
    runs = np.array_split(np.arange(len(layers) - 1), wanted - 1)
    return [*(_merge([layers[i] for i in run]) for run in runs), layers[-1]]


def norms_and_biases(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that usually have no weight decay.

    These are all vectors (weights of normalisation layers, biases, ConvNeXt's layer scale) and all
    parameters with "bias" in their name (tables of relative position biases in Swin and MaxViT).
    """
    return {
        parameter
        for name, parameter in module.named_parameters()
        if parameter.squeeze().ndim <= 1 or "bias" in name.rpartition(".")[2]
    }


def current_rates(optimizer: optim.Optimizer) -> dict[str, float]:
    """Return the current learning rate of each layer group, by name; the head is last."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def set_lr_factor(optimizer: optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to `base_lr * factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def apply_schedule(optimizer: optim.Optimizer, point: SchedulePoint) -> None:
    """Set the learning rate and momentum of every parameter group to the values of the schedule.

    For Adam, the momentum is the first beta. If `point.momentum` is None, only the learning rate is
    set.
    """
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
    """Update the weights from the gradients, then reset the gradients.

    The order is:

    1. L1 decay: l1 * sign(weight) is added to the gradients of parameters with weight decay.
    2. Clipping of the norm of all gradients together (Pascanu et al., 2013, "On the difficulty of
       training recurrent neural networks").
    3. Decoupled decay for SGD: weights are multiplied by 1 - lr * decay (Loshchilov & Hutter, 2019,
       "Decoupled Weight Decay Regularization", algorithm 1).
    4. The optimizer's own step.
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
