"""Learning-rate range test: train with a changing rate, and suggest rates from the loss curve.

Smith, 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

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

from training.optim.optimizer import set_lr_factor

Direction = Literal["up", "down"]
Pick = Literal["valley", "steepest", "minimum/10", "minimum"]


@dataclass(frozen=True)
class Curve:
    """Loss curve of a learning-rate range test, and the rates suggested from the curve.

    Attributes:
        rates: Tested learning rates, ascending.
        losses: Smoothed loss at each of the rates.
        valley: Suggested rate in the range of rates where the loss falls: on a log scale, two
            thirds of the way from the smallest to the largest rate of this range. It is at most
            `tenth_of_minimum`. fast.ai has a suggestion of the same name.
        steepest: Suggested rate, at which the loss falls fastest.
        minimum: A rate that is too large for training. In an upward test, the rate with the lowest
            loss; at larger rates the loss rises. In a downward test, the rate at which the loss
            started to fall.
        direction: "up" if the rates were tested in ascending order, else "down".
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    valley: float
    steepest: float
    minimum: float
    direction: Direction = "up"

    @property
    def tenth_of_minimum(self) -> float:
        """A tenth of the rate with the lowest loss, but at least the smallest tested rate.

        No suggestion is above it, except `minimum` itself.
        """
        return max(self.minimum / 10, self.rates[0])

    def pick(self, name: Pick) -> float:
        """Return the suggested learning rate with the given name."""
        if name == "minimum":
            return self.minimum
        limit = self.tenth_of_minimum
        suggestions = {"valley": self.valley, "steepest": self.steepest, "minimum/10": limit}
        return min(suggestions[name], limit)


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
    """Run a learning-rate range test: change the rate after every step, and record the losses.

    In an upward test, the rate increases exponentially from `low` to `high`. The test ends when the
    loss diverges.

    In a downward test, the rate decreases from `high` to `low`. A diverged model is useless for
    testing smaller rates. If the loss is not finite, or is above four times the loss of the initial
    weights, the initial weights are restored, the losses so far are discarded, and the test
    continues at the current rate.

    At the end, also after an error, the model's weights, buffers and modes, the optimizer state and
    the random state are restored bit for bit.

    Args:
        model: The network, from inputs to logits [N, classes].
        optimizer: Optimizer whose parameter groups have a `base_lr`. The group with the largest
            `base_lr` gets the tested rate; the rates of the other groups are in proportion to their
            `base_lr`.
        batches: Pairs of inputs and labels; at most `steps` batches are used.
        loss_of: Function from logits and labels to the loss, a scalar.
        low: Smallest tested rate.
        high: Largest tested rate.
        steps: Number of tested rates.
        direction: "up" or "down".
        beta: Decay of the exponential mean (with bias correction) that smooths the loss.
        autocast: Function that returns a context for one forward pass. A new context is needed for
            every step, because autocast caches the cast weights.
        train: Function that puts the model into training mode. None: `model.train`.
        take_step: Function that updates the weights. `optimizer_step` clips gradients and decays
            weights as in training.
        on_step: Function that is called after every step, such as for a progress bar.

    Raises:
        ValueError: The loss diverges within two steps, or never falls.
    """
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    largest = max(group["base_lr"] for group in optimizer.param_groups)

    def restore() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.load_state_dict(weights)
        # A copy, because the optimiser updates the tensors that it loads in place.
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))

    def forward(inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast():
            logits = model(inputs)
        return loss_of(logits, labels)

    rates: list[float] = []
    losses: list[float] = []
    initial_losses: list[float] = []  # losses of the initial weights
    mean, best = 0.0, math.inf
    try:
        (train or model.train)()
        for step, (inputs, labels) in zip(range(steps), batches, strict=False):
            share = step / max(steps - 1, 1)
            rate = low * (high / low) ** (share if direction == "up" else 1 - share)
            set_lr_factor(optimizer, rate / largest)
            loss = forward(inputs, labels)
            value = loss.item()
            if (
                direction == "down"
                and rates
                and not value <= 4 * sum(initial_losses) / len(initial_losses)
            ):
                restore()
                set_lr_factor(optimizer, rate / largest)
                rates, losses, mean = [], [], 0.0
                loss = forward(inputs, labels)
                value = loss.item()
            if not math.isfinite(value):
                break
            if not rates:
                initial_losses.append(value)
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
        restore()
        for module, training in modes.items():
            module.training = training
        torch.set_rng_state(rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)
    return suggest(rates, losses, direction)


def suggest(rates: list[float], losses: list[float], direction: Direction = "up") -> Curve:
    """Determine the suggested rates from the results of a range test.

    Args:
        rates: Learning rates in the order of the test.
        losses: Smoothed loss at each of the rates.
        direction: "up" if the rates are ascending, else "down".

    Raises:
        ValueError: There are fewer than two rates, or the loss never falls.
    """
    if len(rates) < 2:
        raise ValueError("the loss diverges within two steps")
    lowest = int(np.argmin(losses))
    if lowest == 0:
        raise ValueError(f"the loss never falls from {rates[0]:.2g} to {rates[-1]:.2g}")
    start = int(np.argmax(losses[: lowest + 1]))  # the descent starts at the highest loss
    if direction == "down":  # the descent ends at 95 % of its height, before a flat tail
        left = losses[lowest] + 0.05 * (losses[start] - losses[lowest])
        lowest = next(i for i in range(start, lowest + 1) if losses[i] <= left)
    minimum = rates[lowest if direction == "up" else start]
    valley = rates[start + round((lowest - start) * (2 / 3 if direction == "up" else 1 / 3))]
    steepest = rates[_steepest(rates, losses, start, lowest)]
    order = slice(None) if direction == "up" else slice(None, None, -1)
    curve = Curve(tuple(rates[order]), tuple(losses[order]), valley, steepest, minimum, direction)
    return replace(curve, valley=min(valley, curve.tenth_of_minimum))


def _steepest(rates: list[float], losses: list[float], start: int, lowest: int) -> int:
    """Return the index of the rate at which the loss falls fastest.

    The slope is measured over a tenth of the curve, because single steps are noisy. If the loss
    still falls after the first fifth of the curve, that fifth is ignored, because the smoothed loss
    of the first steps is noisy too.

    Args:
        rates: Learning rates in the order of the test.
        losses: Smoothed loss at each of the rates.
        start: Index at which the loss starts to fall.
        lowest: Index at which the loss stops falling.
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
