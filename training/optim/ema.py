"""Exponential moving average of weights and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

UPDATES = "updates"


class Ema:
    """Moving average of a module's weights and BatchNorm statistics over the optimizer steps.

    Polyak & Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging"; Tarvainen &
    Valpola, 2017, "Mean teachers are better role models". The decay is at most
    (1 + updates) / (10 + updates), so that the initial weights lose their influence within the
    first updates. Tensors that do not change, such as frozen weights, stay bit-equal. Integer
    tensors are not averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the module's current weights; `decay` is in [0, 1).

        The module must not be moved to another device or memory layout afterwards.
        """
        self.decay, self.updates = decay, 0
        # References are kept: `state_dict()` takes a millisecond, too long for every step.
        state = module.state_dict()
        self._weights = {name: value for name, value in state.items() if value.is_floating_point()}
        self.averages = {name: value.clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the module's current weights to the average; call it after every step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, weights = list(self.averages.values()), list(self._weights.values())
        # A single call, because one for each of some hundred tensors takes longer than arithmetic.
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """A context in which the module has the averages; afterwards it has its own weights."""
        own = {name: value.clone() for name, value in self._weights.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(own)

    def equal_weights(self, names: Iterable[str]) -> bool:
        """Whether the named weights equal their averages, so that `swapped` doesn't change them."""
        weights = self._weights
        return all(torch.equal(self.averages[n], weights[n]) for n in names if n in weights)

    def state(self) -> dict[str, Tensor]:
        """The state for `load`: the averages, not copied, and the number of updates."""
        return {UPDATES: torch.tensor(self.updates), **self.averages}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; raises KeyError if it belongs to another module."""
        for name, average in self.averages.items():
            average.copy_(state[name])
        self.updates = int(state[UPDATES])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._weights.items():
            value.copy_(values[name])
