import math
import random
import warnings

import pytest
import torch
from torch import optim

from serving.errors import OptionError
from training.config.schema import Stage
from training.optim.schedules import (
    cosine,
    cycle_at,
    cycle_lengths,
    one_cycle,
    plateau,
    schedule_at,
    sgdr,
    triangular,
    triangular2,
    warm_up,
)

SCHEDULES = {
    "sgdr": {"cycles": 3, "cycle_mult": 2},
    "cosine": {"cycle_len": 5},
    "one_cycle": {"cycle_len": 5},
    "triangular": {"cycles": 2, "cycle_mult": 1.5},
    "triangular2": {"cycles": 3, "cycle_len": 2},
    "exp_range": {"cycles": 3, "gamma": 0.99},
    "cyclical": {"cycles": 3, "scale": "1 / x"},
    "step": {"cycle_len": 5, "gamma": 0.5},
    "plateau": {"cycle_len": 5},
    "constant": {"cycle_len": 5},
}


def stage(**options):
    return Stage(name="tail", **options)


def rates_of_torch(make, steps, lr=1.0, **options):
    """Rate and momentum at every step of a torch scheduler."""
    optimizer = optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer, **options)
    rates, momenta = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            momenta.append(optimizer.param_groups[0]["momentum"])
            optimizer.step()
            scheduler.step()
    return rates, momenta


def test_every_schedule_of_the_schema_is_tested():
    assert set(SCHEDULES) == set(Stage.model_fields["schedule"].annotation.__args__)


def test_cosine_has_the_given_values_at_its_ends_and_their_mean_in_the_middle():
    assert cosine(1, 0, 0) == 1
    assert cosine(1, 0, 1) == pytest.approx(0, abs=1e-15)
    assert cosine(1, 0, 0.5) == pytest.approx(0.5)
    assert cosine(2, 4, 0.5) == pytest.approx(3)


CYCLES = [
    (3, 1, 1, [1, 1, 1]),
    (3, 1, 2, [1, 2, 4]),
    (2, 2, 1.5, [2, 3]),
    (1, 5, 2, [5]),
    (3, 1, 1.1, [1, 1.1, 1.21]),
]


@pytest.mark.parametrize(("cycles", "length", "mult", "lengths"), CYCLES)
def test_each_cycle_is_cycle_mult_times_as_long_as_the_one_before(cycles, length, mult, lengths):
    assert cycle_lengths(cycles, length, mult) == pytest.approx(lengths)
    start = 0.0
    for index, each in enumerate(lengths):
        assert sgdr(start, cycles, length, mult) == 1  # a warm restart
        assert sgdr(start + each / 2, cycles, length, mult) == pytest.approx(0.5)
        assert sgdr(start + each - 1e-9, cycles, length, mult) == pytest.approx(0, abs=1e-6)
        assert triangular(start, cycles, length, mult) == pytest.approx(0, abs=1e-9)
        assert triangular(start + each / 2, cycles, length, mult) == pytest.approx(1)
        assert triangular(start + each / 4, cycles, length, mult) == pytest.approx(0.5)
        assert triangular2(start + each / 2, cycles, length, mult) == pytest.approx(0.5**index)
        start += each
    for shape in (sgdr, triangular, triangular2):
        assert shape(start, cycles, length, mult) == 0
        assert shape(start + 7, cycles, length, mult) == 0
    assert cycle_at(start, cycles, length, mult) == (cycles - 1, 1)
    assert cycle_at(-1, cycles, length, mult) == (0, 0)


def test_sgdr_falls_within_a_cycle_and_is_between_0_and_1():
    for i in range(300):
        here, there = sgdr(i / 100, 2, 1, 2), sgdr((i + 1) / 100, 2, 1, 2)
        assert 0 <= here <= 1
        if (i + 1) not in (100, 300):
            assert there < here


@pytest.mark.parametrize("mult", [1, 2])
def test_sgdr_equals_torch(mult):
    stage_ = stage(schedule="sgdr", cycles=3, cycle_len=2, cycle_mult=mult, floor=0.01)
    expected, _ = rates_of_torch(
        optim.lr_scheduler.CosineAnnealingWarmRestarts,
        stage_.epochs * 10,
        T_0=20,
        T_mult=mult,
        eta_min=0.01,
    )
    assert [schedule_at(stage_, i / 10, 10).factor for i in range(len(expected))] == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"schedule": "triangular"}, {"mode": "triangular"}),
        ({"schedule": "triangular2"}, {"mode": "triangular2"}),
        ({"schedule": "exp_range", "gamma": 0.97}, {"mode": "exp_range", "gamma": 0.97}),
        (
            {"schedule": "cyclical", "scale": "0.5 * (1 + sin(x * pi / 2))"},
            {"scale_fn": lambda x: 0.5 * (1 + math.sin(x * math.pi / 2)), "scale_mode": "cycle"},
        ),
        (
            {"schedule": "cyclical", "scale": "1 / 5 ** (x * 0.01)", "scale_per": "step"},
            {"scale_fn": lambda x: 1 / 5 ** (x * 0.01), "scale_mode": "iterations"},
        ),
    ],
)
def test_cyclical_rates_equal_torch(options, theirs):
    stage_ = stage(cycles=4, cycle_len=2, floor=0.1, **options)
    expected, _ = rates_of_torch(
        optim.lr_scheduler.CyclicLR,
        80,
        base_lr=0.1,
        max_lr=1.0,
        step_size_up=10,
        cycle_momentum=False,
        **theirs,
    )
    assert [schedule_at(stage_, i / 10, 10).factor for i in range(80)] == pytest.approx(expected)


def test_a_scale_formula_is_clamped_to_0_and_1():
    up = stage(schedule="cyclical", cycles=3, scale="x - 1")
    assert [schedule_at(up, i + 0.5, 10).factor for i in range(3)] == [0, 1, 1]
    late = stage(schedule="cyclical", cycles=1, scale="1 / (x - 3)", scale_per="step")
    with pytest.raises(OptionError, match=r"stage\.tail\.scale = '1 / \(x - 3\)'.* x = 3"):
        schedule_at(late, 0.3, 10)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"schedule": "cyclical"}, "needs scale"),
        ({"scale": "os.system('true')"}, "use numbers, x, pi"),
        ({"schedule": "cyclical", "scale": "log(x - 2)", "cycles": 3}, "no finite value at x = 1"),
        ({"schedule": "cyclical", "scale": "1 / x", "scale_per": "step"}, "at x = 0"),
        ({"schedule": "exp_range"}, "every step"),
    ],
)
def test_wrong_schedule_options_are_errors_of_the_recipe(options, reason):
    with pytest.raises(ValueError, match=reason):
        stage(**options)


def test_one_cycle_rises_then_falls():
    assert one_cycle(0, 4) == pytest.approx(0.04)
    assert one_cycle(1, 4) == pytest.approx(1)
    assert one_cycle(4, 4) == pytest.approx(0, abs=1e-15)
    assert one_cycle(0.5, 4) == pytest.approx(0.52)
    assert math.isclose(one_cycle(2.5, 4), 0.5)
    assert one_cycle(0, 0) == pytest.approx(0, abs=1e-15)  # no division by zero epochs


def test_one_cycle_and_its_momentum_equal_torch():
    total = 400
    expected, momenta = rates_of_torch(
        optim.lr_scheduler.OneCycleLR,
        total,
        max_lr=1.0,
        total_steps=total + 1,
        pct_start=0.25,
        div_factor=25,
        final_div_factor=1e12,
        base_momentum=0.85,
        max_momentum=0.95,
    )
    peak = 0.25 * (total + 1) - 1  # torch: one step before a quarter
    stage_ = stage(schedule="one_cycle", cycle_len=4)
    for i, (rate, momentum) in enumerate(zip(expected, momenta, strict=True)):
        share = i / peak / 4 if i < peak else 0.25 + 0.75 * (i - peak) / (total - peak)
        point = schedule_at(stage_, share * 4, 100, momentum=0.95)
        assert point.factor == pytest.approx(rate, abs=1e-9)
        assert point.momentum == pytest.approx(momentum)


def test_one_cycle_does_not_raise_a_momentum_below_momentum_low():
    stage_ = stage(schedule="one_cycle", cycle_len=4, momentum_low=0.85)
    assert {schedule_at(stage_, i / 10, 10, momentum=0.5).momentum for i in range(40)} == {0.5}


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"one_cycle"}))
def test_only_one_cycle_changes_momentum(name):
    assert schedule_at(stage(schedule=name, **SCHEDULES[name]), 0.3, 10).momentum is None


def test_cosine_equals_torch():
    stage_ = stage(schedule="cosine", cycle_len=5, floor=0.01)
    expected, _ = rates_of_torch(optim.lr_scheduler.CosineAnnealingLR, 51, T_max=50, eta_min=0.01)
    found = [schedule_at(stage_, i / 10, 10).factor for i in range(51)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_step_equals_torch(every):
    stage_ = stage(schedule="step", cycle_len=8, step_every=every, gamma=0.3)
    expected, _ = rates_of_torch(optim.lr_scheduler.StepLR, 80, step_size=10 * every, gamma=0.3)
    assert [schedule_at(stage_, i / 10, 10).factor for i in range(80)] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_plateau_equals_torch(seed):
    rng = random.Random(seed)
    patience, gamma = rng.randint(0, 3), rng.choice([0.1, 0.5])
    losses = [math.exp(-0.05 * i) + rng.gauss(0, 0.1) for i in range(60)]
    losses[7] = losses[6]
    losses[9] = min(losses[:9]) * (1 - 0.5e-4)  # lower by less than the threshold
    optimizer = optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=gamma, patience=patience, threshold=1e-4, eps=0
    )
    factors = set()
    for i, loss in enumerate(losses):
        theirs.step(loss)
        factor = plateau(losses[: i + 1], patience, gamma)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        factors.add(factor)
    assert len(factors) > 2


def test_plateau_depends_on_the_losses_and_the_floor():
    stage_ = stage(schedule="plateau", cycle_len=6, step_every=1, gamma=0.5, floor=0.4)
    assert schedule_at(stage_, 5, 10).factor == 1
    assert schedule_at(stage_, 3, 10, [1.0, 1.0, 1.0]).factor == 0.5
    assert schedule_at(stage_, 5, 10, [1.0] * 5).factor == 0.4  # the floor


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("steps", [1, 7])
def test_every_schedule_is_between_its_floor_and_1(name, floor, steps):
    stage_ = stage(schedule=name, floor=floor, **SCHEDULES[name])
    flat = [1.0] * stage_.epochs
    here = [
        schedule_at(stage_, epoch + step / steps, steps, flat[:epoch]).factor
        for epoch in range(stage_.epochs)
        for step in range(steps)
    ]
    assert min(here) >= floor
    assert max(here) <= 1
    end = schedule_at(stage_, stage_.epochs, steps, flat)
    assert schedule_at(stage_, stage_.epochs + 3, steps, flat) == end
    assert schedule_at(stage_, -1.0, steps) == schedule_at(stage_, 0.0, steps)
    if name in ("sgdr", "cosine", "one_cycle", "triangular", "triangular2", "cyclical"):
        assert end.factor == pytest.approx(floor, abs=1e-12)


def test_fractional_cycles_end_with_whole_epochs():
    stage_ = stage(schedule="triangular", cycles=3, cycle_mult=1.5)  # 1 + 1.5 + 2.25 epochs
    assert stage_.epochs == 5
    assert schedule_at(stage_, 0.5 * 5 / 4.75, 10).factor == pytest.approx(1)
    assert schedule_at(stage_, (2.5 + 2.25 / 2) * 5 / 4.75, 10).factor == pytest.approx(1)
    assert schedule_at(stage_, 5, 10).factor == 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("length", [0.5, 2.0])
def test_warm_up_multiplies_the_schedule(name, length):
    plain = stage(schedule=name, **SCHEDULES[name])
    warm = plain.model_copy(update={"warm_up": length})
    ratios = []
    for i in range(40):
        ratios.append(warm_up(i / 10, length, 10))
        expected = schedule_at(plain, i / 10, 10).factor * ratios[-1]
        assert schedule_at(warm, i / 10, 10).factor == pytest.approx(expected)
    warming = round(length * 10)
    assert ratios[:warming] == pytest.approx([(i + 1) / warming for i in range(warming)])
    assert set(ratios[warming:]) == {1}


def test_a_warm_up_shorter_than_a_step_has_no_effect():
    assert warm_up(0.0, 0.05, 10) == 1
    assert warm_up(0.0, 0.5, 1) == 1
