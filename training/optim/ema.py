"""Exponential moving average (EMA) of weights and BatchNorm statistics during training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

UPDATES = "updates"


class Ema:
    """Exponential moving average of a module's weights and BatchNorm statistics.

    Polyak & Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging"; Tarvainen &
    Valpola, 2017, "Mean teachers are better role models".

    An update sets each average to decay * average + (1 - decay) * weight. The decay used is at most
    (1 + updates) / (10 + updates). With this limit the initial weights lose their influence within
    the first updates. Averages of tensors that do not change, such as frozen weights, stay
    bit-equal to the tensors. Integer tensors are not averaged.

    Attributes:
        decay: Upper limit of the decay used, in [0, 1).
        updates: Number of updates so far.
        averages: Average of each floating-point tensor, by the name in the module's state dict.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start with the module's current weights as the averages.

        Args:
            module: The module. From now on it must stay on its device and in its memory layout.
            decay: Upper limit of the decay used, in [0, 1).
        """
        self.decay, self.updates = decay, 0
        # References are kept: `state_dict()` takes a millisecond, too long for every step.
        state = module.state_dict()
        self._weights = {name: value for name, value in state.items() if value.is_floating_point()}
        self.averages = {name: value.clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages from the module's current weights. Call it after every step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, weights = list(self.averages.values()), list(self._weights.values())
        # A single call, because one for each of some hundred tensors takes longer than arithmetic.
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Return a context in which the module's weights are replaced by the averages.

        At the end of the context the module gets its own weights back.
        """
        own = {name: value.clone() for name, value in self._weights.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(own)

    def equal_weights(self, names: Iterable[str]) -> bool:
        """Return whether the named weights equal their averages.

        If the result is true, `swapped` does not change these weights. Names without an average are
        ignored.
        """
        weights = self._weights
        return all(torch.equal(self.averages[n], weights[n]) for n in names if n in weights)

    def state(self) -> dict[str, Tensor]:
        """Return the averages (not copied) and the number of updates, as tensors for `load`."""
        return {UPDATES: torch.tensor(self.updates), **self.averages}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore averages and number of updates from the result of `state`.

        Raises:
            KeyError: `state` lacks a tensor of this module.
        """
        for name, average in self.averages.items():
            average.copy_(state[name])
        self.updates = int(state[UPDATES])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._weights.items():
            value.copy_(values[name])
