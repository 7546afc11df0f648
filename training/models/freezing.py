"""Freezing: which parameters of a body train, and which modules stay in eval mode."""

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
    """How a body is frozen. Names are relative to the body.

    Attributes:
        trainable: Names of parameters with gradients.
        eval_modules: Names of modules that stay in eval mode after `train()`.
        prefix: Number of leading children that are frozen and have no state that changes.
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

    The body is not changed. A module is frozen if it has parameters and all of them are frozen; its
    dropout and stochastic depth are then off. A module without parameters is frozen if its parent
    is. If it is a child of the body, it is frozen if the child before it is, so that the trainable
    layers never start with an in-place activation.

    Args:
        body: As in `backbones.Backbone`.
        groups: As in `backbones.Backbone`.
        unfreeze: Number of layer groups to train, counted from the end; all if there are fewer. Or
            `fnmatch` patterns for names of parameters, or of modules with everything inside.
        batchnorm: Mode of unfrozen BatchNorms, whose scale and shift train: "fixed" keeps the
            statistics; "train" updates them.
        frozen_batchnorm: Mode of frozen BatchNorms: "eval" changes nothing; "stats" updates the
            statistics; "train" also trains scale and shift (Frankle et al., 2021, "Training
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
    """Index of the child of the body that contains a parameter."""
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
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
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
