"""Laws of both natural orders, for any names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.utils.natural_sort import natural, natural_letters_first
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts

NAMES = texts(surrogates=True) | st.lists(st.sampled_from("ab019."), max_size=8).map("".join)
WORDS = st.lists(st.sampled_from("ab .-_é"), max_size=4).map("".join)
NUMBERS = st.integers(0, 10**30)
ORDERS = pytest.mark.parametrize("key", [natural, natural_letters_first])


@ORDERS
@given(st.lists(NAMES, max_size=8), st.randoms(use_true_random=False))
@examples(100)
def test_the_order_is_total(key, names, random) -> None:
    """Only equal names have equal keys, so the order of the input does not matter."""
    mixed = random.sample(names, len(names))
    assert sorted(mixed, key=key) == sorted(names, key=key)
    assert len({str(key(name)) for name in names}) == len(set(names))


@ORDERS
@given(WORDS, NUMBERS, NUMBERS, NAMES, NAMES)
@examples(100)
def test_numbers_are_ordered_by_value(key, word, one, other, end, other_end) -> None:
    low, high = sorted((one, other))
    if low != high:
        ends = [f"{number}x{end}" for number, end in ((low, end), (high, other_end))]
        assert key(f"{word}{ends[0]}") < key(f"{word}{ends[1]}")
        assert key(f"{word}00{ends[0]}") < key(f"{word}{ends[1]}")


@given(WORDS, NUMBERS, NAMES, NAMES)
@examples(100)
def test_numbers_come_before_letters_or_after_them(word, number, end, other_end) -> None:
    digits, letters = f"{word}{number}{end}", f"{word}a{other_end}"
    assert natural(digits) < natural(letters)
    if word:
        assert natural_letters_first(word) < natural_letters_first(f"{word}{number}")
    assert natural_letters_first(f"a{end}") < natural_letters_first(f"{number}{other_end}")
