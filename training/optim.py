"""Parameter groups: discriminative learning rates, no decay on norms and biases."""

from __future__ import annotations

from itertools import pairwise

from torch import nn, optim

from training.model import Classifier
from training.options import OptimizerConfig


def build(
    classifier: Classifier, config: OptimizerConfig, lr: float, lr_divide: float
) -> optim.Optimizer:
    """An optimiser over what trains, and nothing else.

    Each parameter group carries `base_lr`; a schedule sets `lr = base_lr * factor`.

    Args:
        classifier: Already frozen as the stage wants it.
        config: Kind, momentum, weight decay.
        lr: The head's learning rate.
        lr_divide: Each layer group's rate is the rate of the group behind it divided by this
            (Howard & Ruder, 2018, "Universal Language Model Fine-tuning", 3.2).
    """
    groups = []
    for depth, part in enumerate(reversed(layer_groups(classifier))):
        rate = lr / lr_divide**depth
        for decay, parameters in _split_decay(part):
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": rate,
                        "base_lr": rate,
                        "weight_decay": config.weight_decay if decay else 0.0,
                    }
                )
    if config.kind == "adamw":
        return optim.AdamW(groups, lr=lr, betas=(config.momentum, 0.999))
    return optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0)


def layer_groups(classifier: Classifier) -> list[nn.Module]:
    """What trains, from the deepest layer group to the head."""
    starts = [*classifier.groups, len(classifier.body)]
    spans = pairwise(starts)
    body: list[nn.Module] = [classifier.body[a:b] for a, b in spans if a >= classifier.frozen]
    return [*body, classifier.head]


def set_factor(optimizer: optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `base_lr * factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _split_decay(module: nn.Module) -> list[tuple[bool, list[nn.Parameter]]]:
    """Weights decay; norms, biases and ConvNeXt's layer scale, all vectors in effect, do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        (True, [p for p in parameters if p.squeeze().ndim > 1]),
        (False, [p for p in parameters if p.squeeze().ndim <= 1]),
    ]
