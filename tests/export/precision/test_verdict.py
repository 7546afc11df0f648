"""The verdict on a reduced precision: its figures, its limits, and what the manifest says."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from export.precision import loss_bounds
from export.precision.evidence import Answers, Evidence, evidence
from export.precision.verdict import (
    DEFAULT_BUDGET,
    Verdict,
    compare_with_fp32,
    decide,
    remedy,
)

KEPT = Verdict(
    photos=200,
    accuracy=0.97,
    accuracy_fp32=0.98,
    drop=1.2344,
    interval=(-0.5004, 2.5006),
    speedup=2.3456,
    budget=1.5,
    at_most=1.4444,
    at_least=-0.3333,
)


def compare(lost: int, won: int, both: int = 90, neither: int = 10) -> Verdict:
    """Counts of photos that only fp32, only the other, both or neither classify correctly."""
    labels = [3] * (lost + won + both + neither)
    fp32 = [3] * lost + [4] * won + [3] * both + [5] * neither
    other = [1] * lost + [3] * won + [3] * both + [2] * neither
    return compare_with_fp32(fp32, other, labels, speedup=2.0, budget=0.25)


def test_a_comparison_has_the_figures_of_both_graphs() -> None:
    verdict = compare(lost=7, won=3)
    assert verdict.photos == 110
    assert verdict.accuracy_fp32 == 97 / 110
    assert verdict.accuracy == 93 / 110
    assert verdict.drop == pytest.approx(100 * 4 / 110, rel=1e-12)
    assert (verdict.speedup, verdict.budget, verdict.not_finite) == (2.0, 0.25, 0)
    default = compare_with_fp32([0], [0], [0], speedup=1.5)
    assert (default.budget, default.speedup) == (DEFAULT_BUDGET, 1.5) == (0.5, 1.5)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (7, 3), (3, 7), (1, 0), (20, 0)])
def test_the_interval_is_that_of_agresti_and_min(lost: int, won: int) -> None:
    """The variance of the mean of +1, -1 and 0, with half a photo more in each of four cells."""
    half = Fraction(1, 2)
    cells = {1: lost + half, -1: won + half, 0: 100 + 2 * half}
    count = sum(cells.values())
    mean = sum(value * weight for value, weight in cells.items()) / count
    variance = sum(weight * (value - mean) ** 2 for value, weight in cells.items()) / count**2
    reach = norm.ppf(0.975) * math.sqrt(variance)
    expected = 100 * (float(mean) - reach), 100 * (float(mean) + reach)
    assert compare(lost, won).interval == pytest.approx(expected, rel=1e-6)
    low, high = compare(lost, won).interval
    assert low < high


def test_arrays_are_compared_as_lists_are() -> None:
    rng = np.random.default_rng(0)
    fp32, other, labels = rng.integers(0, 3, (3, 50))
    lists = compare_with_fp32(list(fp32), list(other), list(labels), speedup=1.0)
    assert compare_with_fp32(fp32, other, labels, speedup=1.0) == lists


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"at_most": 1.5, "at_least": 1.5}, None),  # the budget itself
        (
            {"drop": 1.8, "at_most": 2.0, "at_least": 1.5001},
            "accuracy falls by 1.80 points, and the budget is 1.5",
        ),
        (
            {"at_most": 1.5001},
            "accuracy may fall by up to 1.50 points (95 % confidence), and the budget is 1.5",
        ),
        ({"at_most": 9.0, "insisted": True}, None),
        (
            {"drop": 1.8, "at_most": 2.0, "at_least": 1.5001, "insisted": True},
            "accuracy falls by 1.80 points, and the budget is 1.5",
        ),
        ({"speedup": 1.0001}, None),
        ({"speedup": 1.0}, "it is no faster here: 1.00 times fp32"),
        ({"speedup": 0.5}, "it is no faster here: 0.50 times fp32"),
        ({"not_finite": 1}, "the logits of 1 photos are not finite"),
        (
            {"not_finite": 2, "at_least": 9.0, "speedup": 0.5},
            "the logits of 2 photos are not finite",
        ),
        (
            {"drop": 9.0, "at_most": 12.0, "at_least": 8.0, "speedup": 0.5},
            "accuracy falls by 9.00 points, and the budget is 1.5",
        ),
        ({"at_most": 9.0, "speedup": 0.5}, "it is no faster here: 0.50 times fp32"),
    ],
)
def test_a_precision_is_kept_within_its_limits(
    changes: dict[str, float], reason: str | None
) -> None:
    verdict = replace(KEPT, **changes)
    assert verdict.refusal_reason == reason
    assert verdict.kept is (reason is None)
    entry = verdict.to_dict()
    assert (entry["kept"], entry["why_not"]) == (verdict.kept, reason)
    assert entry["sure"] is (verdict.at_most <= 1.5 or verdict.at_least > 1.5)
    shown = "kept" if reason is None else f"refused: {reason}"
    if verdict.is_unsure:
        shown = f"not kept: {reason}; {remedy('int8', 1.5, 200, verdict.at_most)}"
    elif reason is None and verdict.at_most > 1.5:
        shown = f"kept, as --precision int8 asks, though {verdict.doubt}"
    assert verdict.summary("int8").startswith(f"int8 {shown}; on 200 held-out photos ")


def test_the_entry_of_the_manifest_and_the_line_of_the_log() -> None:
    assert KEPT.to_dict() == {
        "kept": True,
        "why_not": None,
        "photos": 200,
        "accuracy": 0.97,
        "accuracy_fp32": 0.98,
        "fell_points": 1.234,
        "fell_interval": [-0.5, 2.501],
        "fell_at_most": 1.444,
        "fell_at_least": -0.333,
        "confidence": 0.95,
        "photos_by": {"held_out": 200, "folds": 0, "training": 0, "worth": 200},
        "least_budget_points": 2.21,
        "sure": True,
        "budget_points": 1.5,
        "times_fp32": 2.35,
    }
    assert KEPT.summary("fp16") == (
        "fp16 kept; on 200 held-out photos 97.00%, fp32 98.00% (falls by 1.23 points; at most 1.44 "
        "with 95 % confidence), 2.35 times as fast"
    )
    both = replace(KEPT, evidence=Evidence(200, 700, 850.4, 0, 0))
    assert "at most 1.44 with 95 % confidence by these and 700 training photos)" in both.summary(
        "x"
    )
    assert both.to_dict()["photos_by"] == {
        "held_out": 200,
        "folds": 0,
        "training": 700,
        "worth": 850,
    }


# ---- how sure it is


def test_four_photos_decide_nothing() -> None:
    """Whatever the answers, except that all are lost."""
    for lost in range(4):
        verdict = compare(lost, 0, both=4 - lost, neither=0)
        assert verdict.is_unsure
        assert not verdict.kept
        assert not verdict.to_dict()["sure"]
    assert (
        "4 photos can show at best that it falls by no more than 64.38 points, and 1,791 or more "
        "are needed for 0.25; add held-out photos with --photos DIR or --folds RUN, or "
        "use --precision int8 to keep it nevertheless; on 4 held-out photos"
    ) in verdict.summary("int8")


def test_on_221_photos_two_more_wrong_decide_nothing_about_half_a_point() -> None:
    for lost in (0, 1, 2, 3):
        verdict = compare_of_221(lost)
        assert verdict.is_unsure, lost
        insisted = replace(verdict, insisted=True)
        assert insisted.kept
        assert insisted.summary("int8").startswith("int8 kept, as --precision int8 asks, though ")
    assert compare_of_221(15).refusal_reason == (
        "accuracy falls by 6.79 points, and the budget is 0.5"
    )
    assert not replace(compare_of_221(15), insisted=True).kept


def compare_of_221(lost: int) -> Verdict:
    other = [1] * lost + [0] * (221 - lost)
    return compare_with_fp32([0] * 221, other, [0] * 221, speedup=2.0, budget=0.5)


@given(
    photos=st.integers(1, 3000),
    lost=st.integers(0, 40),
    won=st.integers(0, 40),
    budget=st.floats(0.05, 30),
    insisted=st.booleans(),
)
def test_no_decision_turns_on_one_photo(
    photos: int, lost: int, won: int, budget: float, insisted: bool
) -> None:
    """What is kept is within the budget, and what is refused is beyond it, as surely as stated,
    whichever answer the graph had given to any single photo; and neither becomes the other."""
    lost = min(lost, photos)
    won = min(won, photos - lost)
    verdict = judge(photos, lost, won, budget, insisted)
    neighbours = [
        judge(photos, *counts, budget, insisted)
        for counts in ((lost + 1, won), (lost - 1, won), (lost, won + 1), (lost, won - 1))
        if min(counts) >= 0 and sum(counts) <= photos
    ]
    for other in neighbours:
        assert not (verdict.at_most <= budget and other.at_least > budget)
        assert not (verdict.at_least > budget and other.at_most <= budget)
    if verdict.at_most <= budget:
        for counts in ((lost + 1, won), (lost, won - 1)):
            if min(counts) >= 0 and sum(counts) <= photos:
                assert 100 * loss_bounds._upper(*counts, photos) <= budget
    if verdict.at_least > budget:
        for counts in ((lost, won + 1), (lost - 1, won)):
            if min(counts) >= 0 and sum(counts) <= photos:
                assert -100 * loss_bounds._upper(*reversed(counts), photos) > budget


def judge(photos: int, lost: int, won: int, budget: float, insisted: bool) -> Verdict:
    other = [1] * lost + [0] * won + [0] * (photos - lost - won)
    fp32 = [0] * lost + [1] * won + [0] * (photos - lost - won)
    options = {"speedup": 2.0, "budget": budget, "insisted": insisted}
    return compare_with_fp32(fp32, other, [0] * photos, **options)


def test_the_remedy_has_no_folds_for_a_checkpoint_and_no_budget_of_many_points() -> None:
    few, many = (remedy("int8", 0.5, photos, has_run=False) for photos in (21, 300))
    assert "--folds" not in few + many
    assert "add photos to --photos DIR, or use --precision int8" in few
    assert "add photos to --photos DIR, use --accuracy-budget 1.49, or --precision int8" in many
    assert "--folds RUN, use --accuracy-budget 1.49, or --precision" in remedy("int8", 0.5, 300)
    assert "--accuracy-budget" not in remedy("int8", 0.5, 300, 5.01)
    assert "use --accuracy-budget 5," in remedy("int8", 0.5, 300, 5.0)


ANSWERS = st.sampled_from([(0.0, 0.0)] * 30 + [(1.0, 0.0), (0.0, 1.0)])


@given(
    st.lists(ANSWERS, min_size=1, max_size=600),
    st.lists(st.sampled_from([0.0] * 20 + [1.0]), max_size=900),
    st.lists(st.floats(0, 30), min_size=2, max_size=2).map(sorted),
)
def test_what_a_budget_keeps_a_larger_one_keeps(
    held_out: list[tuple[float, float]], changed: list[float], budgets: list[float]
) -> None:
    lost, won = np.array(held_out, np.float32).T
    margins = np.linspace(0, 1, len(lost), dtype=np.float32)
    answers = Answers(margins, lost, won)
    rest = np.array(changed, np.float32)
    training = Answers(np.linspace(0, 2, len(rest), dtype=np.float32), rest, 0 * rest)

    def kept(budget: float) -> bool:
        def judge(more: Answers | None) -> Verdict:
            truth = np.zeros(len(lost), int)
            found = evidence(answers, more)
            return compare_with_fp32(
                won,
                lost,
                truth,
                speedup=2.0,
                budget=budget,
                evidence=found,  # type: ignore[arg-type]
            )

        return decide(judge, lambda: training if len(rest) else None).kept

    smaller, larger = budgets
    assert kept(larger) or not kept(smaller)


def test_photos_that_leave_no_doubt_are_not_joined_by_training_photos() -> None:
    def judge(more: Answers | None) -> Verdict:
        return replace(KEPT, at_most=1.0 if more is None else 9.0)

    assert decide(judge, lambda: pytest.fail("not needed")).kept
    unsure = decide(
        lambda more: replace(judge(more), budget=0.5), lambda: Answers(*[np.ones(1)] * 3)
    )
    assert unsure.at_most == 1.0
