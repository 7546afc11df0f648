"""How much memory the bodies of requests may take."""

import asyncio

import pytest

from serving.errors import Overloaded
from serving.http.body_budget import COPIES, SLOW_SECONDS, SMALL, BodyBudget, Upload

MB = 10**6
NOW = 1000.0


def upload(age: float = 0.0) -> Upload:
    return Upload(asyncio.Timeout(None), NOW - age)


def test_bodies_share_the_budget_and_give_it_back() -> None:
    budget, one = BodyBudget(10 * MB), upload()
    budget.take(one, 2 * MB, complete=True)
    assert budget.used == one.taken == COPIES * 2 * MB
    budget.check(1 * MB, NOW)
    with pytest.raises(Overloaded):
        budget.check(3 * MB, NOW)
    budget.give_back(one)
    budget.give_back(one)
    assert budget.used == one.taken == 0
    budget.take(one, 3 * MB, complete=True)
    assert budget.used == 6 * MB


def test_one_body_is_accepted_however_small_the_budget_is() -> None:
    budget, one = BodyBudget(10), upload()
    budget.check(MB, NOW)
    budget.take(one, MB, complete=False)
    budget.take(one, MB, complete=True)

    async def another() -> None:
        budget.take(upload(), 1, complete=True)

    with pytest.raises(Overloaded):
        asyncio.run(another())


def test_large_bodies_leave_room_for_small_ones() -> None:
    budget = BodyBudget(100 * MB)
    budget.take(upload(), 36 * MB, complete=True)
    with pytest.raises(Overloaded):
        budget.check(SMALL + MB, NOW)
    budget.check(SMALL, NOW)
    budget.take(upload(), SMALL, complete=True)


def fill(ages: list[float], budget: BodyBudget, *, complete: bool = False) -> list[Upload]:
    """Uploads of 1 MB each, of the given ages in seconds."""
    now = asyncio.get_running_loop().time()
    uploads = [Upload(asyncio.timeout(60), now - age) for age in ages]
    for one in uploads:
        budget.take(one, MB, complete=complete)
    return uploads


async def run(one: Upload) -> bool:
    """Wait as a reader does; returns whether the upload was ended."""
    try:
        async with one.timeout:
            await asyncio.sleep(0.1)
    except TimeoutError:
        return True
    return False


async def ended(uploads: list[Upload], *actions: object) -> list[bool]:
    tasks = [asyncio.create_task(run(one)) for one in uploads]
    await asyncio.sleep(0)
    for action in actions:
        action()  # type: ignore[operator]
    return await asyncio.gather(*tasks)


def test_slow_uploads_are_ended_the_oldest_first_until_there_is_room() -> None:
    async def body() -> None:
        budget, newcomer = BodyBudget(8 * MB), upload()
        uploads = fill([30, 20, 10, SLOW_SECONDS - 1], budget)

        def arrive() -> None:
            budget.check(MB, asyncio.get_running_loop().time())
            budget.take(newcomer, MB, complete=True)  # admitted at once
            assert budget.used == budget.total

        assert await ended(uploads, arrive) == [True, False, False, False]
        assert [one.ended for one in uploads] == [True, False, False, False]
        for one in (*uploads, newcomer):
            budget.give_back(one)
        assert budget.used == 0

    asyncio.run(body())


def test_complete_and_young_bodies_are_never_ended() -> None:
    async def body() -> None:
        budget = BodyBudget(8 * MB)
        uploads = fill([30, 30], budget, complete=True) + fill([SLOW_SECONDS - 1] * 2, budget)

        def arrive() -> None:
            with pytest.raises(Overloaded):
                budget.check(MB, asyncio.get_running_loop().time())
            with pytest.raises(Overloaded):
                budget.take(upload(), MB, complete=True)

        assert await ended(uploads, arrive) == [False] * 4

    asyncio.run(body())


def test_a_slow_upload_ends_none_that_began_after_it() -> None:
    async def body() -> None:
        budget = BodyBudget(6 * MB)
        uploads = fill([30, 20, 10], budget)

        def grow() -> None:
            with pytest.raises(Overloaded):
                budget.take(uploads[0], 1, complete=False)
            budget.take(uploads[1], 1, complete=False)

        assert await ended(uploads, grow) == [True, False, False]

    asyncio.run(body())


def test_large_bodies_end_slow_ones_within_their_three_quarters() -> None:
    async def body() -> None:
        budget, newcomer = BodyBudget(40 * MB), upload()
        uploads = fill([30] * 10, budget) + fill([30] * 10, budget, complete=True)

        def arrive() -> None:
            now = asyncio.get_running_loop().time()
            budget.check(5 * MB, now)
            with pytest.raises(Overloaded):
                budget.check(6 * MB, now)
            budget.take(newcomer, 5 * MB, complete=True)
            assert budget.used == 30 * MB

        assert await ended(uploads, arrive) == [True] * 10 + [False] * 10

    asyncio.run(body())
