"""The verdict on a reduced precision: its figures, its limits, and what the manifest says."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import norm

from export.precision.verdict import DEFAULT_BUDGET, Verdict, compare_with_fp32

KEPT = Verdict(
    photos=200,
    accuracy=0.97,
    accuracy_fp32=0.98,
    drop=1.2344,
    interval=(-0.5004, 2.5006),
    speedup=2.3456,
    budget=1.5,
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
        ({"drop": 1.5}, None),  # the budget itself
        ({"drop": 1.5001, "budget": 1.5}, "accuracy falls by 1.50 points, and the budget is 1.5"),
        ({"drop": -3.0}, None),
        ({"speedup": 1.0001}, None),
        ({"speedup": 1.0}, "it is no faster here: 1.00 times fp32"),
        ({"speedup": 0.5}, "it is no faster here: 0.50 times fp32"),
        ({"not_finite": 1}, "the logits of 1 photos are not finite"),
        (
            {"not_finite": 2, "drop": 9.0, "speedup": 0.5},
            "the logits of 2 photos are not finite",
        ),
        ({"drop": 9.0, "speedup": 0.5}, "accuracy falls by 9.00 points, and the budget is 1.5"),
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
    shown = "kept" if reason is None else f"refused: {reason}"
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
        "budget_points": 1.5,
        "times_fp32": 2.35,
    }
    assert KEPT.summary("fp16") == (
        "fp16 kept; on 200 held-out photos 97.00%, fp32 98.00% (falls by 1.23 points, -0.50 to "
        "2.50), 2.35 times as fast"
    )
