"""Identity of labels: what is the same, what looks alike, and what is another class."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.utils.label_names import (
    LabelMatcher,
    nearest_labels,
    normalize_label,
    show_label,
    similar_labels,
    similarity_key,
)
from tests.support.hypothesis_profiles import examples

NFC, NFD = "caf\xe9", "cafe\u0301"


def test_unicode_form_and_spaces_at_the_ends_are_no_difference() -> None:
    for name in (NFC, NFD, f" {NFC}", f"{NFD}\t", f"\ufeff{NFC}", f"{NFC}\xa0", f"{NFC}\u200b"):
        assert normalize_label(name) == NFC
    assert normalize_label("red  panda ") == "red  panda"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Cat", "cat"),
        ("STRASSE", "straße"),
        ("0", "0.0"),
        ("7", "007"),
        ("-1", "-01.00"),
        ("2.50", "2.5"),
        ("red panda", "red  panda"),
        ("red panda", "red\xa0panda"),
        ("\uff43\uff41\uff54", "cat"),
        ("ca\u200dt", "cat"),
        ("cat", "ca\xadt"),
    ],
)
def test_labels_that_look_alike_are_found(one: str, other: str) -> None:
    assert similar_labels([one, "dog", other, one]) == [(one, other)]


@pytest.mark.parametrize(
    "labels", ["a A b B", "cat dog", "1 10 100", "1.5 15", "0 0x0", "v1 v01", "- --", "7a 07a"]
)
def test_other_labels_do_not_look_alike(labels: str) -> None:
    assert similar_labels(labels.split()) == []


def test_names_are_matched_with_the_labels_of_a_model() -> None:
    matcher = LabelMatcher([NFD, "Cardigan", "cardigan", "7", "Dog"])
    assert [matcher.match(name) for name in (NFC, f"{NFD} ", "cardigan", "007", "DOG")] == [
        *(NFD, NFD, "cardigan", "7", "Dog")
    ]
    assert matcher.match("CARDIGAN") is None  # it may be either
    assert matcher.match("wolf") is None
    assert matcher.respelled == {"007": "7", "DOG": "Dog"}


def test_the_nearest_labels_are_found_and_escapes_show_the_difference() -> None:
    assert nearest_labels("Bee", ["ants", "bees", "wasp"]) == ["bees"]
    assert nearest_labels("x", ["ants", "bees"]) == []
    assert (show_label(NFC), show_label(NFD)) == (r"'caf\xe9'", r"'cafe\u0301'")


@given(st.text(max_size=20))
@examples(200)
def test_normal_forms_and_keys_are_stable(name: str) -> None:
    label = normalize_label(name)
    assert normalize_label(label) == label
    assert unicodedata.is_normalized("NFC", label)
    assert similarity_key(label) == similarity_key(name)
    assert LabelMatcher([name]).match(label) == name


@given(st.text("0", max_size=4000), st.text("0", max_size=4000))
@examples(20)
def test_long_numbers_take_no_time(before: str, after: str) -> None:
    similarity_key(f"{before}.{after}x")
