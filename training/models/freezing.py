"""Determine which parameters of a body train, and which modules stay in eval mode.

A body is the network without pooling and head.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from serving.errors import OptionError


@dataclass(frozen=True)
class Freezing:
    """Trainable parameters and frozen modules of a body. Names are relative to the body.

    Attributes:
        trainable: Names of the parameters that train.
        eval_modules: Names of the modules that stay in eval mode after `train()`.
        prefix: Number of children at the start of the body whose outputs do not change in training:
            all their parameters are frozen, and no BatchNorm updates its statistics.
    """

    trainable: frozenset[str]
    eval_modules: frozenset[str]
    prefix: int


Unfreeze = int | float | Sequence[str | int | float]
"""Layers of a body that train; see `plan_freezing`."""


def plan_freezing(
    body: nn.Sequential,
    groups: Sequence[int],
    unfreeze: Unfreeze,
    *,
    batchnorm: Literal["fixed", "train"] = "fixed",
    frozen_batchnorm: Literal["eval", "stats", "train"] = "eval",
) -> Freezing:
    """Determine which parameters train and which modules stay in eval mode.

    The body is not changed. A module with parameters is frozen if all its parameters are frozen.
    Dropout and stochastic depth are switched off in frozen modules. A module without parameters is
    frozen if its parent module is frozen. A child of the body without parameters is frozen if the
    child before it is frozen. Therefore the trainable layers never start with an in-place
    activation.

    Args:
        body: The network without pooling and head.
        groups: Index of the first child of each layer group of the body, ascending from 0.
        unfreeze: Which layers train:

            - An int is the number of layer groups, counted from the end; if the body has fewer
              groups, all train.
            - A float between 0 and 1 is the share of the body's weight layers, counted from the
              end; see `share_start`.
            - A list has `fnmatch` patterns: a pattern matches the name of a parameter, or the name
              of a module with all its parameters. If its last item is a number, this number is used
              for a body in which a pattern matches nothing.
        batchnorm: Mode of BatchNorms that are not frozen: "fixed" trains scale and shift but keeps
            the running statistics; "train" also updates the statistics.
        frozen_batchnorm: Mode of frozen BatchNorms: "eval" changes nothing; "stats" updates the
            running statistics; "train" also trains scale and shift (Frankle et al., 2021, "Training
            BatchNorm and Only BatchNorm").

    Raises:
        OptionError: A pattern matches no parameter.
    """
    parameters = [name for name, _ in body.named_parameters()]
    unfrozen = set(_unfrozen(body, groups, unfreeze, parameters))
    frozen = _frozen_modules(body, parameters, unfrozen)
    trainable, eval_modules = set(unfrozen), set(frozen)
    for name, module in body.named_modules():
        if not is_batchnorm(module):
            continue
        if name not in frozen:
            eval_modules |= {name} if batchnorm == "fixed" else set()
        elif frozen_batchnorm != "eval":
            eval_modules.discard(name)
            if frozen_batchnorm == "train":
                trainable |= {f"{name}.{own}" for own, _ in module.named_parameters()}
    children = [name for name, _ in body.named_children()]
    prefix = next((i for i, name in enumerate(children) if name not in frozen), len(body))
    if frozen_batchnorm != "eval" and has_batchnorm(body[:prefix]):
        prefix = 0
    return Freezing(frozenset(trainable), frozenset(eval_modules), prefix)


def share_start(body: nn.Sequential, share: float) -> int:
    """Return the index of the first child to train, so that about `share` of the body trains.

    The share is that of the weight layers: the modules that own a parameter of two or more
    dimensions, such as convolutions and linear layers. Of all children with weight layers, the one
    is chosen from which on the share of the weight layers is nearest to `share`; of two that are
    equally near, the later one. At least one weight layer trains.
    """
    shares = shares_from(body)
    best = max(shares)
    for start in sorted(shares, reverse=True):
        if abs(shares[start] - share) < abs(shares[best] - share) - 1e-9:
            best = start
    return best


def shares_from(body: nn.Sequential) -> dict[int, float]:
    """Return the share of the body's weight layers from each child with weight layers to the end.

    The keys are indices of children in ascending order; see `share_start` for weight layers.
    """
    counts = [
        sum(
            any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
            for module in child.modules()
        )
        for child in body
    ]
    return {i: sum(counts[i:]) / sum(counts) for i, count in enumerate(counts) if count}


def uses_fallback(body: nn.Module, unfreeze: Unfreeze) -> bool:
    """Whether `unfreeze` is a list with patterns that match nothing in the body, and a number."""
    if isinstance(unfreeze, int | float):
        return False
    parameters = [name for name, _ in body.named_parameters()]
    patterns = [item for item in unfreeze if isinstance(item, str)]
    return len(patterns) < len(unfreeze) and not all(
        _matches(pattern, parameters) for pattern in patterns
    )


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of any dimension."""
    return isinstance(module, _BatchNorm)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether a module contains a BatchNorm."""
    return any(map(is_batchnorm, module.modules()))


def _unfrozen(
    body: nn.Sequential, groups: Sequence[int], unfreeze: Unfreeze, parameters: Sequence[str]
) -> Iterable[str]:
    if not isinstance(unfreeze, int | float):
        if uses_fallback(body, unfreeze):
            (number,) = (item for item in unfreeze if not isinstance(item, str))
            return _unfrozen(body, groups, number, parameters)
        patterns = [item for item in unfreeze if isinstance(item, str)]
        return [name for pattern in patterns for name in _matching(pattern, parameters)]
    if isinstance(unfreeze, int):
        first = (*groups, len(body))[max(len(groups) - unfreeze, 0)]
    else:
        first = share_start(body, unfreeze)
    return [name for name in parameters if _child(body, name) >= first]


def _child(body: nn.Sequential, name: str) -> int:
    """Return the index of the child of `body` that contains the parameter `name`."""
    return list(body._modules).index(name.partition(".")[0])


def _matches(pattern: str, parameters: Iterable[str]) -> list[str]:
    return [
        name for name in parameters if any(fnmatchcase(part, pattern) for part in _prefixes(name))
    ]


def _matching(pattern: str, parameters: Iterable[str]) -> list[str]:
    found = _matches(pattern, parameters)
    if found:
        return found
    known = sorted({part for name in parameters for part in _prefixes(name)})
    near = difflib.get_close_matches(pattern.removesuffix(".*"), known, n=3)
    hint = " or ".join(map(repr, near))
    if not near:
        hint = f"one of {', '.join(dict.fromkeys(name.partition('.')[0] for name in parameters))}"
    raise OptionError(
        f"{pattern!r} matches no parameter of the body; use {hint}; "
        "or a number, which suits every network: 1 is the last layer group, 0.2 the last fifth"
    )


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of all parent modules, then the name itself: `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _frozen_modules(
    body: nn.Module, parameters: Iterable[str], unfrozen: Iterable[str]
) -> set[str]:
    with_parameters = {part for name in parameters for part in _prefixes(name)}
    with_unfrozen = {part for name in unfrozen for part in _prefixes(name)}
    frozen: set[str] = set()
    previous_is_frozen = True
    for name, _ in body.named_modules():
        parent = name.rpartition(".")[0]
        if name in with_parameters:
            is_frozen = name not in with_unfrozen
        else:
            is_frozen = parent in frozen if parent else previous_is_frozen
        if name and is_frozen:
            frozen.add(name)
        if name and not parent:
            previous_is_frozen = is_frozen
    return frozen
