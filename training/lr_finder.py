"""The learning-rate range test (Smith, 2017, "Cyclical Learning Rates", section 3.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn, optim

from serving.files import write_aside
from training import optim as groups


@dataclass(frozen=True)
class Curve:
    """Rates tried and the smoothed loss at each, with what they suggest.

    valley: two thirds along the descent, on the log scale of the rates, as fast.ai's suggestion of
        that name; never past `minimum / 10`.
    steepest: where the loss falls fastest. minimum: the lowest loss, a trap: too large by far.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    valley: float
    steepest: float
    minimum: float


def range_test(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 80,
    beta: float = 0.9,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    train: Callable[[], object] | None = None,
) -> Curve:
    """Raise the rate exponentially, a step a batch, until the loss diverges.

    Weights, buffers, modes, optimiser and random state are given back bit for bit, come what may.

    Args:
        model: Takes a batch's inputs to logits [N, classes].
        optimizer: Its groups carry `base_lr`; the largest of them is swept from `low` to `high`,
            the others in proportion.
        batches: (inputs, labels); at most `steps` are taken.
        loss_of: (logits, labels) -> scalar.
        low, high: Of the largest group's rate.
        beta: Smoothing of the loss, an exponential mean with bias correction.
        autocast: Entered anew for every forward pass: one that spans a step would go on computing
            with the weights it cast before.
        train: Puts the model into training mode; its own `train` where not given.

    Raises:
        ValueError: The loss never falls, or diverges within two steps.
    """
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    largest = max(group["base_lr"] for group in optimizer.param_groups)
    rates: list[float] = []
    losses: list[float] = []
    mean, best = 0.0, math.inf
    try:
        (train or model.train)()
        for step, (inputs, labels) in zip(range(steps), batches, strict=False):
            rate = low * (high / low) ** (step / max(steps - 1, 1))
            groups.set_factor(optimizer, rate / largest)
            with autocast():
                logits = model(inputs)
            loss = loss_of(logits, labels)
            value = loss.item()
            if not math.isfinite(value):
                break
            mean = beta * mean + (1 - beta) * value
            smooth = mean / (1 - beta ** (step + 1))
            best = min(best, smooth)
            if step > 10 and smooth > 4 * best:
                break
            rates.append(rate)
            losses.append(smooth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)
        for module, training in modes.items():
            module.training = training
        torch.set_rng_state(rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)
    return suggest(rates, losses)


def suggest(rates: list[float], losses: list[float]) -> Curve:
    """Read a curve; errors as `range_test`."""
    if len(rates) < 2:
        raise ValueError("the loss diverges within two steps")
    lowest = int(np.argmin(losses))
    if lowest == 0:
        raise ValueError("the loss never falls")
    minimum = rates[lowest]
    down = np.asarray(losses[: lowest + 1])
    if len(down) > 2:
        slope = np.gradient(down, np.log(rates[: len(down)]))
        steepest = rates[int(np.argmin(slope))]
        start = int(np.argmax(down))  # the descent begins at its highest point
        valley = rates[start + round((lowest - start) * 2 / 3)]
    else:
        steepest = valley = minimum
    return Curve(
        tuple(rates), tuple(losses), max(min(valley, minimum / 10), rates[0]), steepest, minimum
    )


def plot(curve: Curve, path: Path, title: str) -> None:
    """Draw the curve with its suggestions as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.rates, curve.losses, color="#33658a", linewidth=2)
    marks = (
        ("valley (taken)", curve.valley, "#2a9d3a"),
        ("steepest", curve.steepest, "#f6ae2d"),
        ("minimum (too large)", curve.minimum, "#d1495b"),
    )
    for name, rate, colour in marks:
        axes.axvline(rate, color=colour, linestyle="--", label=f"{name}: {rate:.2g}")
    axes.set(xscale="log", xlabel="learning rate of the head", ylabel="smoothed loss", title=title)
    spread = max(curve.losses[0], min(curve.losses)) - min(curve.losses)
    axes.set_ylim(min(curve.losses) - 0.1 * spread - 0.01, curve.losses[0] + 0.5 * spread + 0.01)
    axes.legend()
    axes.grid(alpha=0.3)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
