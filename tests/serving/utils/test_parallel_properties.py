"""Laws of the ordered parallel map, for any numbers of items, threads and pending calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.utils.parallel import map_ordered
from tests.support.hypothesis_profiles import examples

COUNTS = st.integers(0, 30)
WORKERS = st.integers(1, 4)
WINDOWS = st.integers(0, 12)


class Failure(Exception):
    pass


@given(st.lists(st.integers(), max_size=30), WORKERS, WINDOWS)
@examples(60)
def test_it_equals_map(items, workers, window) -> None:
    found = map_ordered(lambda item: item * 2, items, workers=workers, window=window)
    assert list(found) == [item * 2 for item in items]


@given(COUNTS, st.sets(st.integers(0, 30)), st.none() | st.integers(0, 30), WORKERS, WINDOWS)
@examples(60)
def test_results_before_the_first_error_are_yielded_and_none_behind_it(
    count, failing, source_fails_at, workers, window
) -> None:
    """An error of the items may come as soon as they are read ahead, but not before its turn."""

    def items() -> Iterator[int]:
        for number in range(count):
            if number == source_fails_at:
                raise Failure("items")
            yield number

    def function(number: int) -> int:
        if number in failing:
            raise Failure(number)
        return number

    found, error = [], None
    results = map_ordered(function, items(), workers=workers, window=window)
    try:
        for result in results:
            found.append(result)
    except Failure as failure:
        error = failure.args[0]
    assert found == list(range(len(found)))
    first = min((number for number in failing if number < count), default=count)
    stop = count if source_fails_at is None else min(source_fails_at, count)
    if first == stop == count:
        assert (len(found), error) == (count, None)
    elif error == "items":
        assert stop < count
        assert stop - max(window, 2 * workers) < len(found) <= min(first, stop)
    else:
        assert (len(found), error) == (first, first)
    with pytest.raises(StopIteration):
        next(results)


@given(COUNTS, WORKERS, WINDOWS, st.integers(0, 30))
@examples(60)
def test_at_most_a_window_of_items_is_read_ahead_and_closing_stops(
    count, workers, window, taken
) -> None:
    read, started, lock = [0], [0], threading.Lock()
    most = max(window, 2 * workers)

    def items() -> Iterator[int]:
        for number in range(count):
            read[0] += 1
            yield number

    def function(number: int) -> int:
        with lock:
            started[0] += 1
        return number

    results = map_ordered(function, items(), workers=workers, window=window, name="law")
    assert read == [0]
    for number in range(min(taken, count)):
        assert next(results) == number
        assert number < read[0] <= number + most
    before = read[0]
    results.close()
    assert read == [before]
    assert started[0] <= before
    assert not [t for t in threading.enumerate() if t.name.startswith("law")]
