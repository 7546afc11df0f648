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
        """Begin with the module's weights as they are; `decay` in [0, 1)."""
        self.module, self.decay, self.updates = module, decay, 0
        self.averages = {name: value.clone() for name, value in _floats(module).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's weights; call it after every step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = _floats(self.module)
        # At once: a call for each of some hundred tensors takes longer than the arithmetic.
        moved = [weights[name] for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), moved, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages into the module; at the end give its own weights back bit for bit."""
        own = {name: value.clone() for name, value in _floats(self.module).items()}
        try:
            _put(self.averages, self.module)
            yield
        finally:
            _put(own, self.module)

    def settled(self, names: Iterable[str]) -> bool:
        """Whether these weights equal their averages, so that swapping leaves them as they are."""
        weights = _floats(self.module)
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


def _floats(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point()}


@torch.no_grad()
def _put(values: Mapping[str, Tensor], module: nn.Module) -> None:
    for name, value in _floats(module).items():
        value.copy_(values[name])
