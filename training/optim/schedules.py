"""Learning-rate schedules as pure functions of the position in a stage.

Positions are counted in epochs, as floats, so that a schedule does not depend on the batch size.
Each schedule returns the factor in [0, 1] that multiplies every group's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from serving.errors import OptionError
from training.config.formula import compile_formula
from training.config.schema import Stage, cycle_lengths


class SchedulePoint(NamedTuple):
    """The value of a schedule at a position.

    factor: multiplies every group's rate; in [0, 1]. momentum: None leaves the optimiser's.
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
    """The schedule of a stage at a position.

    `stage.floor` is the lowest factor of every schedule; only the warm-up goes below it. Cycles of
    fractional length are stretched to end with the stage's whole epochs.

    Args:
        stage: The schedule and its options.
        position: Epochs since the start of the stage; limited to [0, `stage.epochs`].
        steps: Steps per epoch.
        losses: Validation losses of the stage's finished epochs, for `plateau`.
        momentum: The optimiser's momentum; one_cycle lowers it to `stage.momentum_low`.

    Raises:
        OptionError: `stage.scale` has no finite value at this position, such as log(x) at 0.
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
    """The schedule without its warm-up."""
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
    """From `start` at position 0 to `end` at position 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2


def cycle_at(
    position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0
) -> tuple[int, float]:
    """(number of the cycle at a position, from 0; elapsed share of the cycle, in [0, 1]).

    Positions beyond the last cycle count as its end.
    """
    for index, length in enumerate(cycle_lengths(cycles, cycle_len, cycle_mult)):
        if position < length - 1e-10:  # sums of fractional lengths are not exact
            return index, max(position, 0.0) / length
        position -= length
    return cycles - 1, 1.0


def sgdr(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """Stochastic gradient descent with warm restarts.

    Cosine from 1 to 0 in every cycle, restarting at 1 (Loshchilov & Hutter, 2017,
    "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, with eta_min = 0).
    """
    return cosine(1.0, 0.0, cycle_at(position, cycles, cycle_len, cycle_mult)[1])


def triangular(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """Linear from 0 to 1 and back to 0 in every cycle.

    Smith, 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.1; a cycle is
    twice the paper's step size.
    """
    return 1 - abs(2 * cycle_at(position, cycles, cycle_len, cycle_mult)[1] - 1)


def triangular2(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """`triangular` with the amplitude halved after each cycle (Smith, 2017, section 3.1)."""
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
    """`triangular` times gamma ** step number (Smith, 2017, section 3.1)."""
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
    """`triangular` times a user-defined scale, clamped to [0, 1].

    Args:
        position: In epochs, like the cycle lengths.
        cycles, cycle_len, cycle_mult: As in `cycle_lengths`.
        scale: Function of `step_number` if that is given, else of the cycle's number, from 1.
        step_number: Steps since the start of the stage, from 0.
    """
    number = cycle_at(position, cycles, cycle_len, cycle_mult)[0] + 1
    height = scale(number if step_number is None else step_number)
    return triangular(position, cycles, cycle_len, cycle_mult) * min(max(height, 0.0), 1.0)


def one_cycle(position: float, epochs: float, warm_up: float = 0.25, start: float = 0.04) -> float:
    """Cosine from `start` to 1 in the first `warm_up` share of the epochs, then cosine to 0.

    Smith & Topin, 2018, "Super-Convergence", with cosine instead of linear ramps, as in fast.ai.
    """
    share = min(max(position / epochs, 0.0), 1.0) if epochs else 1.0
    if share < warm_up:
        return cosine(start, 1.0, share / warm_up)
    return cosine(1.0, 0.0, (share - warm_up) / (1 - warm_up))


def step(position: float, every: int, gamma: float) -> float:
    """Multiply by `gamma` after every `every` epochs."""
    return gamma ** int(position // every)


def plateau(losses: Sequence[float], patience: int, gamma: float) -> float:
    """Multiply by `gamma` when the loss has not improved for more than `patience` epochs.

    Improved means lower by a relative 1e-4 or more; the count restarts after each reduction. Equal
    to torch's ReduceLROnPlateau, as a function of all losses so far.
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
    """Linear warm-up to 1 in the first `epochs`; starts at one step's share instead of 0.

    Goyal et al., 2017, "Accurate, Large Minibatch SGD", section 2.2.
    """
    length = epochs * steps
    return min((position * steps + 1) / length, 1.0) if length > 1 else 1.0
