"""How much memory the bodies of requests may take."""

import pytest

from serving.errors import Overloaded
from serving.http.body_budget import COPIES, SMALL, BodyBudget

MB = 10**6


def test_bodies_share_the_budget_and_give_it_back() -> None:
    budget = BodyBudget(10 * MB)
    taken = budget.take(2 * MB, 2 * MB)
    assert budget.used == taken == COPIES * 2 * MB
    budget.check(1 * MB)
    with pytest.raises(Overloaded):
        budget.check(3 * MB)
    with pytest.raises(Overloaded):
        budget.take(3 * MB, 3 * MB)
    budget.give_back(taken)
    assert budget.used == 0
    assert budget.take(3 * MB, 3 * MB) == 6 * MB


def test_one_body_is_accepted_however_small_the_budget_is() -> None:
    budget = BodyBudget(10)
    budget.check(MB)
    budget.take(MB, MB)
    budget.take(MB, 2 * MB)  # its next chunk
    with pytest.raises(Overloaded):
        budget.take(1, 1)


def test_large_bodies_leave_room_for_small_ones() -> None:
    budget = BodyBudget(100 * MB)
    budget.take(36 * MB, 36 * MB)
    with pytest.raises(Overloaded):
        budget.check(SMALL + MB)
    budget.check(SMALL)
    budget.take(SMALL, SMALL)
