"""The learning-rate range test (Smith, 2017, "Cyclical Learning Rates", section 3.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn, optim

from training.optim.optimizer import set_factor

Direction = Literal["up", "down"]
Pick = Literal["valley", "steepest", "minimum/10", "minimum"]


@dataclass(frozen=True)
class Curve:
    """Rates tried, ascending, and the smoothed loss at each, with what they suggest.

    valley: two thirds along the descent towards the trap, on the log scale of the rates, after
        fast.ai's suggestion of that name; never past `ten`. steepest: where the loss falls fastest.
    minimum: a trap, too large by far. Upwards, the rate of the lowest loss, at which training is
        about to diverge; downwards, where the loss is lowest at the end whatever the rates, the
        largest rate at which it began to fall.
    direction: in which the rates were tried.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    valley: float
    steepest: float
    minimum: float
    direction: Direction = "up"

    @property
    def ten(self) -> float:
        """A tenth of the minimum: no suggestion but the minimum itself is taken past it."""
        return max(self.minimum / 10, self.rates[0])

    def pick(self, name: Pick) -> float:
        """The rate to train with."""
        marks = {"valley": self.valley, "steepest": self.steepest, "minimum/10": self.ten}
        return self.minimum if name == "minimum" else min(marks[name], self.ten)


def range_test(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 80,
    direction: Direction = "up",
    beta: float = 0.9,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    train: Callable[[], object] | None = None,
    take_step: Callable[[optim.Optimizer], object] = lambda optimizer: optimizer.step(),
    on_step: Callable[[], object] | None = None,
) -> Curve:
    """Raise the rate exponentially, a step a batch, until the loss diverges.

    Downwards the rate falls from `high` to `low`. A loss that is no number, or four times that of
    the weights as they were, then sends the model back to them, and the curve begins anew at the
    next lower rate: a model that was blown up would teach nothing about the other rates.

    Weights, buffers, modes, optimiser and random state are given back bit for bit, come what may.

    Args:
        model: Takes a batch's inputs to logits [N, classes].
        optimizer: Its groups carry `base_lr`; the largest of them is swept, the others in
            proportion.
        batches: (inputs, labels); at most `steps` are taken.
        loss_of: (logits, labels) -> scalar.
        low, high: Of the largest group's rate.
        steps: From `low` to `high`.
        direction: "up" or "down".
        beta: Smoothing of the loss, an exponential mean with bias correction.
        autocast: Entered anew for every forward pass: one that spans a step would go on computing
            with the weights it cast before.
        train: Puts the model into training mode; its own `train` where not given.
        take_step: Moves the weights; with `optimizer.step` clipping and decay are as in
            training.
        on_step: Called after every step, for a progress bar.

    Raises:
        ValueError: The curve can't be read; see `suggest`.
    """
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    largest = max(group["base_lr"] for group in optimizer.param_groups)

    def give_back() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.load_state_dict(weights)
        # A copy: the optimiser would go on writing into the tensors that it is given.
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))

    def forward(inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast():
            logits = model(inputs)
        return loss_of(logits, labels)

    rates: list[float] = []
    losses: list[float] = []
    firsts: list[float] = []  # losses of the weights as they were
    mean, best = 0.0, math.inf
    try:
        (train or model.train)()
        for step, (inputs, labels) in zip(range(steps), batches, strict=False):
            share = step / max(steps - 1, 1)
            rate = low * (high / low) ** (share if direction == "up" else 1 - share)
            set_factor(optimizer, rate / largest)
            loss = forward(inputs, labels)
            value = loss.item()
            if direction == "down" and rates and not value <= 4 * sum(firsts) / len(firsts):
                give_back()
                set_factor(optimizer, rate / largest)
                rates, losses, mean = [], [], 0.0
                loss = forward(inputs, labels)
                value = loss.item()
            if not math.isfinite(value):
                break
            if not rates:
                firsts.append(value)
            mean = beta * mean + (1 - beta) * value
            smooth = mean / (1 - beta ** (len(rates) + 1))
            best = min(best, smooth)
            if direction == "up" and step > 10 and smooth > 4 * best:
                break
            rates.append(rate)
            losses.append(smooth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            take_step(optimizer)
            if on_step:
                on_step()
    finally:
        give_back()
        for module, training in modes.items():
            module.training = training
        torch.set_rng_state(rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)
    return suggest(rates, losses, direction)


def suggest(rates: list[float], losses: list[float], direction: Direction = "up") -> Curve:
    """Read a curve, given in the order in which the rates were tried.

    Raises:
        ValueError: It can't be read: it has fewer than two points, or the loss never falls.
    """
    if len(rates) < 2:
        raise ValueError("the loss diverges within two steps")
    lowest = int(np.argmin(losses))
    if lowest == 0:
        raise ValueError(f"the loss never falls from {rates[0]:.2g} to {rates[-1]:.2g}")
    start = int(np.argmax(losses[: lowest + 1]))  # the descent begins at its highest point
    if direction == "down":  # it ends where little is left to fall: the rest is a long flat tail
        left = losses[lowest] + 0.05 * (losses[start] - losses[lowest])
        lowest = next(i for i in range(start, lowest + 1) if losses[i] <= left)
    minimum = rates[lowest if direction == "up" else start]
    valley = rates[start + round((lowest - start) * (2 / 3 if direction == "up" else 1 / 3))]
    steepest = rates[_steepest(rates, losses, start, lowest)]
    order = slice(None) if direction == "up" else slice(None, None, -1)
    curve = Curve(tuple(rates[order]), tuple(losses[order]), valley, steepest, minimum, direction)
    return replace(curve, valley=min(valley, curve.ten))


def _steepest(rates: list[float], losses: list[float], start: int, lowest: int) -> int:
    """The index in the descent around which the loss falls fastest.

    Measured across a tenth of the curve, and not in its first fifth where the descent allows it:
    single steps are noise, and so is the smoothed loss while it is a mean of few.
    """
    around = min(max(len(rates) // 20, 1), (lowest - start) // 2)
    if not around:
        return lowest
    last = lowest - around
    first = max(start + around, min(len(rates) // 5, last))

    def slope(i: int) -> float:
        width = abs(math.log(rates[i + around] / rates[i - around]))
        return (losses[i + around] - losses[i - around]) / width

    return min(range(first, last + 1), key=slope)
