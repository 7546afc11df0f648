"""What trains: which parameters of the body, and what its BatchNorms do meanwhile."""

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
    """What a stage does to a body; names are relative to it.

    trains: parameters with gradients.
    held: modules that stay in eval mode whatever `train()` says.
    prefix: how many of its first children are frozen, and functions without state.
    """

    trains: frozenset[str]
    held: frozenset[str]
    prefix: int


def decide(
    body: nn.Sequential,
    groups: Sequence[int],
    unfreeze: int | Sequence[str],
    *,
    batchnorm: Literal["fixed", "train"] = "fixed",
    frozen_batchnorm: Literal["eval", "stats", "train"] = "eval",
) -> Freezing:
    """Decide what trains; nothing is touched.

    A module none of whose parameters are unfrozen is frozen, with all that is in it: dropout and
    stochastic depth are off there. One without parameters is as what holds it, or at the top of
    the body as the child before it, so that what trains never begins with an in-place activation.

    Args:
        body: As `backbones.Backbone`.
        groups: As `backbones.Backbone`.
        unfreeze: The last so many layer groups, more than there are being all; or patterns of
            `fnmatch` for names of parameters, or of modules with all that is in them.
        batchnorm: Of unfrozen BatchNorms: "fixed" keeps the statistics, scale and shift train.
        frozen_batchnorm: Of frozen ones: "eval" fixes all; with "stats" the statistics move; with
            "train" scale and shift train, too (Frankle et al., 2021, "Training BatchNorm and Only
            BatchNorm").

    Raises:
        OptionError: A pattern that matches nothing.
    """
    parameters = [name for name, _ in body.named_parameters()]
    if isinstance(unfreeze, int):
        starts = (*groups, len(body))
        first = starts[max(len(groups) - unfreeze, 0)]
        unfrozen = {name for name in parameters if _child(body, name) >= first}
    else:
        unfrozen = {name for pattern in unfreeze for name in _matching(pattern, parameters)}
    frozen = _frozen_modules(body, parameters, unfrozen)
    trains, held = set(unfrozen), set(frozen)
    for name, module in body.named_modules():
        if not is_batchnorm(module):
            continue
        if name not in frozen:
            held |= {name} if batchnorm == "fixed" else set()
        elif frozen_batchnorm != "eval":
            held.discard(name)
            if frozen_batchnorm == "train":
                trains |= {f"{name}.{own}" for own, _ in module.named_parameters()}
    children = [name for name, _ in body.named_children()]
    prefix = next((i for i, name in enumerate(children) if name not in frozen), len(body))
    if frozen_batchnorm != "eval" and has_batchnorm(body[:prefix]):
        prefix = 0
    return Freezing(frozenset(trains), frozenset(held), prefix)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of any dimension."""
    return isinstance(module, _BatchNorm)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether there is any inside."""
    return any(map(is_batchnorm, module.modules()))


def _child(body: nn.Sequential, name: str) -> int:
    """The index of the body's child that holds a parameter."""
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
    """a.b.c -> a, a.b, a.b.c."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _frozen_modules(
    body: nn.Module, parameters: Iterable[str], unfrozen: Iterable[str]
) -> set[str]:
    holds = {part for name in parameters for part in _prefixes(name)}
    alive = {part for name in unfrozen for part in _prefixes(name)}
    frozen: set[str] = set()
    before_is_frozen = True
    for name, _ in body.named_modules():
        parent = name.rpartition(".")[0]
        if name in holds:
            is_frozen = name not in alive
        else:
            is_frozen = parent in frozen if parent else before_is_frozen
        if name and is_frozen:
            frozen.add(name)
        if name and not parent:
            before_is_frozen = is_frozen
    return frozen
