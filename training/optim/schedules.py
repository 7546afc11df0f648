"""Learning-rate schedules, as functions without state.

A schedule maps a position to a factor in [0, 1], by which the base learning rate of every parameter
group is multiplied. A position is the number of epochs since the start of a stage, as a float, and
therefore does not depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from serving.errors import OptionError
from training.config.formula import compile_formula
from training.config.schema import Stage, cycle_lengths


class SchedulePoint(NamedTuple):
    """Value of a schedule at a position.

    Attributes:
        factor: Factor of the base learning rates, in [0, 1].
        momentum: Momentum of the optimizer. None: the optimizer's momentum is not changed.
    """

    factor: float
    momentum: float | None = None


def schedule_at(
    stage: Stage,
    position: float,
    steps: int,
    losses: Sequence[float] = (),
    momentum: float = 0.9,
) -> SchedulePoint:
    """Return the value of a stage's schedule at a position.

    `stage.floor` is the lowest factor of every schedule, except during the warm-up. If the cycle
    lengths don't add up to the stage's number of epochs, they are stretched: the last cycle ends
    with the stage.

    Args:
        stage: The stage; it has the name and the options of the schedule.
        position: Epochs since the start of the stage; limited to [0, `stage.epochs`].
        steps: Number of optimizer steps per epoch.
        losses: Validation losses of the stage's finished epochs, for the schedule `plateau`.
        momentum: Momentum of the optimizer. The schedule `one_cycle` lowers it to
            `stage.momentum_low` and raises it again.

    Raises:
        OptionError: The formula `stage.scale` has no finite value at this position; for example
            log(x) at 0.
    """
    position = min(max(position, 0.0), float(stage.epochs))
    factor = _shape(stage, position, steps, losses)
    if stage.warm_up:
        factor *= warm_up(position, stage.warm_up, steps)
    if stage.schedule != "one_cycle":
        return SchedulePoint(factor)
    low = min(stage.momentum_low, momentum)
    height = one_cycle(position, stage.epochs, start=0.0)
    return SchedulePoint(factor, momentum + (low - momentum) * height)


def _shape(stage: Stage, position: float, steps: int, losses: Sequence[float]) -> float:
    """Return the factor of the stage's schedule, without the warm-up."""
    cycles = (stage.cycles, stage.cycle_len, stage.cycle_mult)
    stretched = position * sum(cycle_lengths(*cycles)) / stage.epochs
    step_number = round(position * steps)
    match stage.schedule:
        case "constant":
            return 1.0
        case "step":
            return max(stage.floor, step(position, stage.step_every, stage.gamma))
        case "plateau":
            return max(stage.floor, plateau(losses, stage.step_every, stage.gamma))
        case "one_cycle":
            start = max(0.0, (0.04 - stage.floor) / (1 - stage.floor))
            factor = one_cycle(position, stage.epochs, start=start)
        case "cosine":
            factor = cosine(1.0, 0.0, position / stage.epochs)
        case "sgdr":
            factor = sgdr(stretched, *cycles)
        case "triangular":
            factor = triangular(stretched, *cycles)
        case "triangular2":
            factor = triangular2(stretched, *cycles)
        case "exp_range":
            factor = exp_range(stretched, *cycles, gamma=stage.gamma, step_number=step_number)
        case "cyclical":
            try:
                scale = compile_formula(stage.scale)
                at_step = step_number if stage.scale_per == "step" else None
                factor = cyclical(stretched, *cycles, scale=scale, step_number=at_step)
            except ValueError as error:
                raise OptionError(f"stage.{stage.name}.scale = {stage.scale!r}: {error}") from None
    return stage.floor + (1 - stage.floor) * factor


def cosine(start: float, end: float, position: float) -> float:
    """Interpolate from `start` at position 0 to `end` at position 1 along half a cosine period."""
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2


def cycle_at(
    position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0
) -> tuple[int, float]:
    """Find the cycle at a position.

    Args:
        position: Epochs since the start of the stage. After the last cycle, it counts as the end of
            the last cycle.
        cycles: Number of cycles.
        cycle_len: Length of the first cycle in epochs.
        cycle_mult: Factor from the length of a cycle to the length of the next cycle.

    Returns:
        The number of the cycle, from 0, and the elapsed share of the cycle, in [0, 1].
    """
    for index, length in enumerate(cycle_lengths(cycles, cycle_len, cycle_mult)):
        if position < length - 1e-10:  # sums of fractional lengths are not exact
            return index, max(position, 0.0) / length
        position -= length
    return cycles - 1, 1.0


def sgdr(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """Return the factor of a schedule that falls from 1 to 0 along half a cosine in every cycle.

    Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5,
    with eta_min = 0. The arguments are those of `cycle_at`.
    """
    return cosine(1.0, 0.0, cycle_at(position, cycles, cycle_len, cycle_mult)[1])


def triangular(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """Return the factor of a schedule that rises linearly from 0 to 1 and falls back in each cycle.

    Smith, 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.1. A cycle is
    twice as long as the paper's step size. The arguments are those of `cycle_at`.
    """
    return 1 - abs(2 * cycle_at(position, cycles, cycle_len, cycle_mult)[1] - 1)


def triangular2(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """Return `triangular`, with the height halved after each cycle (Smith, 2017, section 3.1)."""
    return cyclical(position, cycles, cycle_len, cycle_mult, scale=lambda cycle: 0.5 ** (cycle - 1))


def exp_range(
    position: float,
    cycles: int,
    cycle_len: float,
    cycle_mult: float = 1.0,
    *,
    gamma: float,
    step_number: int,
) -> float:
    """Return `triangular` times gamma ** step_number (Smith, 2017, section 3.1).

    `gamma` is a factor per optimizer step, and `step_number` is the number of the step in the
    stage, from 0. The other arguments are those of `cycle_at`.
    """
    return triangular(position, cycles, cycle_len, cycle_mult) * gamma**step_number


def cyclical(
    position: float,
    cycles: int,
    cycle_len: float,
    cycle_mult: float = 1.0,
    *,
    scale: Callable[[float], float],
    step_number: int | None = None,
) -> float:
    """Return `triangular` times the value of `scale`; this value is clamped to [0, 1] first.

    Args:
        position: Epochs since the start of the stage.
        cycles: Number of cycles.
        cycle_len: Length of the first cycle in epochs.
        cycle_mult: Factor from the length of a cycle to the length of the next cycle.
        scale: Function that is called with `step_number`. If `step_number` is None, it is called
            with the number of the cycle, from 1.
        step_number: Number of the optimizer step in the stage, from 0.
    """
    number = cycle_at(position, cycles, cycle_len, cycle_mult)[0] + 1
    height = scale(number if step_number is None else step_number)
    return triangular(position, cycles, cycle_len, cycle_mult) * min(max(height, 0.0), 1.0)


def one_cycle(position: float, epochs: float, warm_up: float = 0.25, start: float = 0.04) -> float:
    """Return the factor of a schedule that rises from `start` to 1, then falls to 0.

    Smith & Topin, 2018, "Super-Convergence". As in fast.ai, both ramps are half a cosine instead of
    linear.

    Args:
        position: Epochs since the start of the stage.
        epochs: Number of epochs of the stage.
        warm_up: Share of the epochs in which the factor rises.
        start: Factor at position 0.
    """
    share = min(max(position / epochs, 0.0), 1.0) if epochs else 1.0
    if share < warm_up:
        return cosine(start, 1.0, share / warm_up)
    return cosine(1.0, 0.0, (share - warm_up) / (1 - warm_up))


def step(position: float, every: int, gamma: float) -> float:
    """Return the factor of a schedule that is multiplied by `gamma` after every `every` epochs."""
    return gamma ** int(position // every)


def plateau(losses: Sequence[float], patience: int, gamma: float) -> float:
    """Return the factor of a schedule that is reduced when the loss stops improving.

    The factor starts at 1. It is multiplied by `gamma` when the loss has not improved for more than
    `patience` epochs; the count of epochs without improvement then starts again at 0. The loss has
    improved if it is below the best loss by more than a relative 1e-4. The result equals that of
    torch's ReduceLROnPlateau.

    Args:
        losses: Loss of each finished epoch.
        patience: Number of epochs.
        gamma: Factor of each reduction.
    """
    factor, best, waited = 1.0, math.inf, 0
    for loss in losses:
        if loss < best * (1 - 1e-4):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            factor, waited = factor * gamma, 0
    return factor


def warm_up(position: float, epochs: float, steps: int) -> float:
    """Return the factor of a linear warm-up to 1.

    The first step has the factor 1 / (number of warm-up steps), not 0. Goyal et al., 2017,
    "Accurate, Large Minibatch SGD", section 2.2.

    Args:
        position: Epochs since the start of the stage.
        epochs: Length of the warm-up in epochs.
        steps: Number of optimizer steps per epoch.
    """
    length = epochs * steps
    return min((position * steps + 1) / length, 1.0) if length > 1 else 1.0
