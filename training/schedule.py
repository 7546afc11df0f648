"""Learning-rate schedules: pure functions of position, and nothing else.

Positions are counted in epochs, as floats, so that a schedule does not depend on the batch size.
Each returns the factor in [0, 1] that multiplies every group's learning rate.
"""

from __future__ import annotations

import math


def cosine(start: float, end: float, position: float) -> float:
    """From `start` at position 0 to `end` at position 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2


def cycle_lengths(cycles: int, cycle_len: float, cycle_mult: float) -> list[float]:
    """The length of every SGDR cycle, in epochs: cycle_len, cycle_len * cycle_mult, and on."""
    return [cycle_len * cycle_mult**i for i in range(cycles)]


def sgdr(position: float, cycles: int, cycle_len: float, cycle_mult: float = 1.0) -> float:
    """Stochastic gradient descent with warm restarts.

    Cosine from 1 to 0 in every cycle, then back to 1 at once (Loshchilov & Hutter, 2017,
    "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, with eta_min = 0).
    """
    for length in cycle_lengths(cycles, cycle_len, cycle_mult):
        if position < length:
            return cosine(1.0, 0.0, position / length)
        position -= length
    return 0.0


def one_cycle(position: float, epochs: float, warm_up: float = 0.25, start: float = 0.04) -> float:
    """Up from `start` to 1 in the first `warm_up` of the run, then down to 0, both by cosine.

    Smith & Topin, 2018, "Super-Convergence", with cosine in place of lines as fast.ai has it.
    """
    share = min(max(position / epochs, 0.0), 1.0) if epochs else 1.0
    if share < warm_up:
        return cosine(start, 1.0, share / warm_up)
    return cosine(1.0, 0.0, (share - warm_up) / (1 - warm_up))
