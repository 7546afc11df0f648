import math

import pytest

from training.schedule import cosine, cycle_lengths, one_cycle, sgdr


def test_cosine_has_its_ends_and_its_middle():
    assert cosine(1, 0, 0) == 1
    assert cosine(1, 0, 1) == pytest.approx(0, abs=1e-15)
    assert cosine(1, 0, 0.5) == pytest.approx(0.5)
    assert cosine(2, 4, 0.5) == pytest.approx(3)


@pytest.mark.parametrize(
    ("cycles", "length", "mult", "lengths"),
    [(3, 1, 1, [1, 1, 1]), (3, 1, 2, [1, 2, 4]), (2, 2, 1.5, [2, 3]), (1, 5, 2, [5])],
)
def test_cycles_have_the_lengths_of_the_paper(cycles, length, mult, lengths):
    assert cycle_lengths(cycles, length, mult) == lengths
    start = 0.0
    for each in lengths:
        assert sgdr(start, cycles, length, mult) == 1  # a warm restart
        assert sgdr(start + each / 2, cycles, length, mult) == pytest.approx(0.5)
        assert sgdr(start + each - 1e-9, cycles, length, mult) == pytest.approx(0, abs=1e-6)
        start += each
    assert sgdr(start, cycles, length, mult) == 0
    assert sgdr(start + 7, cycles, length, mult) == 0


def test_sgdr_falls_within_a_cycle_and_stays_within_0_and_1():
    for i in range(300):
        here, there = sgdr(i / 100, 2, 1, 2), sgdr((i + 1) / 100, 2, 1, 2)
        assert 0 <= here <= 1
        if (i + 1) not in (100, 300):
            assert there < here


def test_one_cycle_rises_then_falls():
    assert one_cycle(0, 4) == pytest.approx(0.04)
    assert one_cycle(1, 4) == pytest.approx(1)
    assert one_cycle(4, 4) == pytest.approx(0, abs=1e-15)
    assert one_cycle(0.5, 4) == pytest.approx(0.52)
    assert math.isclose(one_cycle(2.5, 4), 0.5)
    assert one_cycle(0, 0) == pytest.approx(0, abs=1e-15)  # zero epochs divide by nothing
