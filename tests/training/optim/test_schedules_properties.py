"""Laws of the learning-rate schedules, for any options that a recipe accepts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.hypothesis_profiles import examples
from training.config.schema import Stage
from training.optim.optimizer import apply_schedule
from training.optim.schedules import cycle_at, cycle_lengths, plateau, schedule_at, warm_up

CYCLIC = ("sgdr", "triangular", "triangular2", "exp_range", "cyclical")
SMOOTH = ("cosine", "one_cycle", "triangular", "triangular2")
FALLING = ("cosine", "step", "constant")
SCHEDULES = (*CYCLIC, "cosine", "one_cycle", "step", "plateau", "constant")
SCALES = ("0.5 ** x", "1 / x", "x", "0.5 * (1 + sin(x * pi / 2))", "2 - x")
STEPS = st.integers(1, 200)
LOSSES = st.lists(st.floats(0, 10), max_size=40)


@st.composite
def stages(draw: st.DrawFn, schedules: tuple[str, ...] = SCHEDULES, **fixed: object) -> Stage:
    schedule = draw(st.sampled_from(schedules))
    options: dict[str, object] = {
        "cycles": draw(st.integers(1, 5)),
        "cycle_len": draw(st.integers(1, 6)),
        "cycle_mult": draw(st.floats(1, 3)),
        "floor": draw(st.sampled_from([0.0, 0.001, 0.25, 0.99])),
        "gamma": draw(st.floats(0.9, 1) if schedule == "exp_range" else st.floats(0.01, 1)),
        "step_every": draw(st.integers(1, 5)),
        "momentum_low": draw(st.floats(0, 0.99)),
        "warm_up": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
    }
    if schedule == "cyclical":
        options["scale"] = draw(st.sampled_from(SCALES))
    return Stage(name="tail", schedule=schedule, **options | fixed)


def stretched_ends(stage: Stage) -> list[float]:
    """Positions in epochs at which the cycles of a stage end."""
    lengths = cycle_lengths(stage.cycles, stage.cycle_len, stage.cycle_mult)
    return [end * stage.epochs / sum(lengths) for end in itertools.accumulate(lengths)]


@given(stages(), st.floats(-2, 2000), STEPS, LOSSES, st.floats(0, 0.999))
@examples(200)
def test_every_factor_is_between_the_floor_and_1(stage, position, steps, losses, momentum) -> None:
    point = schedule_at(stage, position, steps, losses, momentum)
    assert 0 <= point.factor <= 1
    if not stage.warm_up:
        assert point.factor >= stage.floor
    if stage.schedule == "one_cycle":
        assert min(stage.momentum_low, momentum) - 1e-12 <= point.momentum <= momentum + 1e-12
    else:
        assert point.momentum is None
    inside = min(max(position, 0.0), float(stage.epochs))
    assert schedule_at(stage, inside, steps, losses, momentum) == point


@given(stages(SMOOTH, warm_up=0.0), st.floats(0, 1), st.floats(1e-7, 1e-3), STEPS)
@examples(200)
def test_smooth_schedules_have_no_jumps(stage, share, part, steps) -> None:
    """No slope is steeper than that of half a cosine over the shortest ramp."""
    here, there = share * stage.epochs, min(share + part, 1.0) * stage.epochs
    shortest = {"cosine": 1.0, "one_cycle": 0.25}.get(stage.schedule)
    ramp = shortest * stage.epochs if shortest else stretched_ends(stage)[0] / 2
    change = abs(schedule_at(stage, there, steps).factor - schedule_at(stage, here, steps).factor)
    assert change <= math.pi / 2 * (there - here) / ramp + 1e-6


@given(stages(("sgdr",), warm_up=0.0), STEPS, st.lists(st.floats(0, 1), min_size=2, max_size=5))
@examples(100)
def test_sgdr_falls_from_1_to_the_floor_in_each_cycle_and_restarts(stage, steps, shares) -> None:
    start = 0.0
    for end in stretched_ends(stage):
        assert schedule_at(stage, start, steps).factor == pytest.approx(1)
        before = schedule_at(stage, end * (1 - 1e-9), steps).factor
        assert before == pytest.approx(stage.floor, abs=1e-6)
        places = sorted(start + share * (end - start) * (1 - 1e-6) for share in shares)
        factors = [schedule_at(stage, place, steps).factor for place in places]
        assert factors == sorted(factors, reverse=True)
        start = end
    assert schedule_at(stage, stage.epochs, steps).factor == pytest.approx(stage.floor, abs=1e-12)


@given(stages(FALLING, warm_up=0.0), STEPS, st.lists(st.floats(0, 50), min_size=2, max_size=6))
@examples(100)
def test_schedules_without_cycles_never_rise(stage, steps, positions) -> None:
    factors = [schedule_at(stage, position, steps).factor for position in sorted(positions)]
    assert factors == sorted(factors, reverse=True)
    assert schedule_at(stage, 0.0, steps).factor == 1


@given(LOSSES, st.integers(0, 5), st.floats(0.01, 1))
@examples(100)
def test_plateau_never_rises_and_forgets_no_reduction(losses, patience, gamma) -> None:
    factors = [plateau(losses[:count], patience, gamma) for count in range(len(losses) + 1)]
    assert factors[0] == 1
    for before, after in itertools.pairwise(factors):
        assert after in (before, before * gamma)
    assert factors[-1] >= gamma ** (len(losses) // (patience + 1)) * (1 - 1e-9)


@given(
    st.integers(1, 8), st.floats(0.1, 20), st.floats(1, 3), st.lists(st.floats(-1, 500), max_size=8)
)
@examples(100)
def test_cycles_follow_one_another(cycles, length, mult, positions) -> None:
    lengths = cycle_lengths(cycles, length, mult)
    found = [cycle_at(position, cycles, length, mult) for position in sorted(positions)]
    assert found == sorted(found)
    for position, (number, share) in zip(sorted(positions), found, strict=True):
        assert 0 <= number < cycles
        assert 0 <= share <= 1
        place = sum(lengths[:number]) + share * lengths[number]
        assert place == pytest.approx(min(max(position, 0), sum(lengths)), abs=1e-6)


@given(st.floats(0, 20), STEPS)
@examples(100)
def test_the_warm_up_rises_in_equal_steps_and_ends_at_1(epochs, steps) -> None:
    count = math.ceil(epochs * steps)
    factors = [warm_up(number / steps, epochs, steps) for number in range(count + 2)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors == sorted(factors)
    assert set(factors[count:]) == {1}
    rises = [after - before for before, after in itertools.pairwise(factors[: count - 1])]
    assert rises == pytest.approx([1 / (epochs * steps)] * len(rises)) if rises else True


def rates(
    stage: Stage, steps: int, losses: list[float], first: int, state: dict[str, object] | None
) -> tuple[list[object], dict[str, object]]:
    """The rates and momenta of the steps from `first` on, as `train_epoch` sets them."""
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "base_lr": 0.1}], lr=0.1, momentum=0.9
    )
    if state is not None:
        optimizer.load_state_dict(state)
    found: list[object] = []
    for number in range(first, stage.epochs * steps):
        epoch, step = divmod(number, steps)
        point = schedule_at(stage, epoch + step / steps, steps, losses[:epoch], 0.9)
        apply_schedule(optimizer, point)
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
    return found, optimizer.state_dict()


@given(stages(), st.integers(1, 7), LOSSES, st.data())
@examples(40)
def test_a_schedule_resumed_at_any_step_equals_the_unbroken_one(stage, steps, losses, data) -> None:
    assume(stage.epochs <= 40)
    unbroken, end = rates(stage, steps, losses, 0, None)
    at = data.draw(st.integers(0, len(unbroken)))
    # The state at `at` is that of a run whose stage ended there; the end state is further off.
    resumed, _ = rates(stage, steps, losses, at, end)
    assert resumed == unbroken[at:]
