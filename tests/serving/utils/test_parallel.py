"""`map_ordered`: results in order, a bounded number pending, errors raised, threads ended."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.utils import parallel
from serving.utils.parallel import map_ordered


@pytest.mark.parametrize("workers", [1, 3, None])
def test_results_come_in_the_order_of_the_items(workers: int | None) -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0)
        return item * item

    results = map_ordered(slow_at_first, range(50), workers=workers)
    assert list(results) == [item * item for item in range(50)]


@pytest.mark.parametrize(
    ("workers", "window", "bound"), [(2, 16, 16), (2, 0, 4), (3, 1, 6), (1, 3, 3)]
)
def test_no_more_than_the_window_is_pending(workers: int, window: int, bound: int) -> None:
    taken: list[int] = []
    started: list[int] = []
    items = (taken.append(number) or number for number in range(1000))  # type: ignore[func-returns-value]
    results = map_ordered(started.append, items, workers=workers, window=window)
    for number in range(100):
        next(results)
        assert number < len(taken) <= number + bound
    results.close()
    assert len(started) <= len(taken) < 200


def test_the_default_is_one_thread_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, **options: str) -> None:
            numbers.append(workers)
            super().__init__(workers, **options)

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(parallel, "cores", lambda: 5)
    assert list(map_ordered(str, range(3))) == ["0", "1", "2"]
    assert list(map_ordered(str, range(3), workers=2)) == ["0", "1", "2"]
    assert numbers == [5, 2]


def test_an_error_of_the_function_comes_after_the_results_before_it() -> None:
    def failing(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = map_ordered(failing, range(1000), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_closing_drops_what_has_not_started_and_ends_the_threads() -> None:
    before = threading.active_count()
    started: list[int] = []

    def slow(item: int) -> int:
        started.append(item)
        time.sleep(0.05)
        return item

    results = map_ordered(slow, range(100), workers=2, window=50, name="slow-map")
    assert next(results) == 0
    assert any(thread.name.startswith("slow-map") for thread in threading.enumerate())
    results.close()
    assert threading.active_count() == before
    assert len(started) < 60
    count = len(started)
    time.sleep(0.2)
    assert len(started) == count
