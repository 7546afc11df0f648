"""A moving average of weights, often better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

UPDATES = "updates"


class Ema:
    """The exponential mean of a module's weights and BatchNorm statistics over its steps.

    Polyak & Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging"; Tarvainen &
    Valpola, 2017, "Mean teachers are better role models". The decay is at most
    (1 + updates) / (10 + updates), so that the first weights are soon forgotten. What does not
    change, such as frozen weights, stays equal bit for bit; integers are not averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Begin with the module's weights as they are, and where they are; `decay` in [0, 1).

        The module is not to be moved to another device or layout after that.
        """
        self.decay, self.updates = decay, 0
        # The tensors themselves: to collect them takes a millisecond, too long for every step.
        state = module.state_dict()
        self._weights = {name: value for name, value in state.items() if value.is_floating_point()}
        self.averages = {name: value.clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's weights; call it after every step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, weights = list(self.averages.values()), list(self._weights.values())
        # At once: a call for each of some hundred tensors takes longer than the arithmetic.
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages into the module; at the end give its own weights back bit for bit."""
        own = {name: value.clone() for name, value in self._weights.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(own)

    def settled(self, names: Iterable[str]) -> bool:
        """Whether these weights equal their averages, so that swapping leaves them as they are."""
        weights = self._weights
        return all(torch.equal(self.averages[n], weights[n]) for n in names if n in weights)

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on: the averages themselves, not copies, and their number."""
        return {UPDATES: torch.tensor(self.updates), **self.averages}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`; a KeyError where it is another module's."""
        for name, average in self.averages.items():
            average.copy_(state[name])
        self.updates = int(state[UPDATES])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Into the module."""
        for name, value in self._weights.items():
            value.copy_(values[name])
