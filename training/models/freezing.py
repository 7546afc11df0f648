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


def plan_freezing(
    body: nn.Sequential,
    groups: Sequence[int],
    unfreeze: int | Sequence[str],
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
        unfreeze: Number of layer groups to train, counted from the end; if the body has fewer
            groups, all train. Or `fnmatch` patterns: a pattern matches the name of a parameter, or
            the name of a module with all its parameters.
        batchnorm: Mode of BatchNorms that are not frozen: "fixed" trains scale and shift but keeps
            the running statistics; "train" also updates the statistics.
        frozen_batchnorm: Mode of frozen BatchNorms: "eval" changes nothing; "stats" updates the
            running statistics; "train" also trains scale and shift (Frankle et al., 2021, "Training
            BatchNorm and Only BatchNorm").

    Raises:
        OptionError: A pattern matches no parameter.
    """
    parameters = [name for name, _ in body.named_parameters()]
    if isinstance(unfreeze, int):
        starts = (*groups, len(body))
        first = starts[max(len(groups) - unfreeze, 0)]
        unfrozen = {name for name in parameters if _child(body, name) >= first}
    else:
        unfrozen = {name for pattern in unfreeze for name in _matching(pattern, parameters)}
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


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of any dimension."""
    return isinstance(module, _BatchNorm)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether a module contains a BatchNorm."""
    return any(map(is_batchnorm, module.modules()))


def _child(body: nn.Sequential, name: str) -> int:
    """Return the index of the child of `body` that contains the parameter `name`."""
    return list(body._modules).index(name.partition(".")[0])


def _matching(pattern: str, parameters: Iterable[str]) -> list[str]:
    found = [
        name for name in parameters if any(fnmatchcase(part, pattern) for part in _prefixes(name))
    ]
    if found:
        return found
    known = sorted({part for name in parameters for part in _prefixes(name)})
    near = difflib.get_close_matches(pattern.removesuffix(".*"), known, n=3)
    hint = " or ".join(map(repr, near))
    if not near:
        hint = f"one of {', '.join(dict.fromkeys(name.partition('.')[0] for name in parameters))}"
    raise OptionError(f"unfreeze: {pattern!r} matches no parameter of the body; use {hint}")


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
