"""Limits of the accuracy drop: the published formula, coverage, and the photos they ask for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, norm

from export.precision import loss_bounds
from export.precision.evidence import Answers, can_weight, evidence

ROOT = Path(__file__).parents[3]


def likelihood_limit(lost: int, won: int, photos: int) -> float:
    """Tango's limit, with the restricted maximum of the likelihood found numerically."""

    def score(drop: float) -> float:
        def loss(share: float) -> float:
            cells = (
                (lost, share + drop),
                (won, share),
                (photos - lost - won, 1 - 2 * share - drop),
            )
            return -sum(count * math.log(max(one, 1e-300)) for count, one in cells if count)

        low, high = max(0.0, -drop), (1 - drop) / 2
        options = {"bounds": (low, high), "method": "bounded", "options": {"xatol": 1e-12}}
        share = minimize_scalar(loss, **options).x if won or drop < 0 else 0.0
        variance = photos * (2 * share + drop - drop * drop)
        return (lost - won - photos * drop) / math.sqrt(variance)

    start = (lost - won) / photos
    return float(brentq(lambda drop: score(drop) + norm.ppf(0.95), start + 1e-9, 1 - 1e-9))


@pytest.mark.parametrize(
    ("lost", "won", "photos"), [(0, 0, 50), (5, 0, 50), (3, 3, 200), (7, 2, 1000), (1, 9, 100)]
)
def test_the_limit_is_that_of_tango(lost: int, won: int, photos: int) -> None:
    limit = loss_bounds._upper(lost, won, photos)
    assert limit == pytest.approx(likelihood_limit(lost, won, photos), abs=2e-5)
    assert loss_bounds.at_most(lost - 1, won, photos) == pytest.approx(limit) or lost == 0


def test_without_changed_answers_the_limit_is_that_of_wilson() -> None:
    """Wilson, 1927, for no event in N trials: z^2 / (N + z^2)."""
    square = norm.ppf(0.95) ** 2
    for photos in (1, 4, 221, 10_000):
        assert loss_bounds._upper(0, 0, photos) == pytest.approx(square / (photos + square))


@given(photos=st.integers(1, 5000), lost=st.integers(0, 300), won=st.integers(0, 300))
def test_the_limits_are_in_order_and_symmetric(photos: int, lost: int, won: int) -> None:
    lost = min(lost, photos)
    won = min(won, photos - lost)
    drop = (lost - won) / photos
    high, low = loss_bounds.at_most(lost, won, photos), loss_bounds.at_least(lost, won, photos)
    assert -1 <= low <= drop <= high <= 1
    assert low == -loss_bounds.at_most(won, lost, photos)
    if lost + won < photos:
        assert loss_bounds.at_most(lost + 1, won, photos) >= high


@pytest.mark.parametrize("photos", [100, 500, 2000])
@pytest.mark.parametrize("changed", [0.0, 0.005, 0.02])
def test_a_loss_beyond_the_limit_is_kept_in_at_most_one_of_twenty_exports(
    photos: int, changed: float
) -> None:
    """Exactly: over all outcomes of a graph that loses as much as the budget."""
    budget = max(0.005, loss_bounds.least_budget(photos)) * 1.05
    kept = 0.0
    lost = np.arange(photos + 1)
    for won in range(photos + 1):
        at_won = binom.pmf(won, photos, changed)
        if at_won < 1e-9 and won > photos * changed:
            break
        of_rest = binom.pmf(lost, photos - won, (changed + budget) / (1 - changed))
        for count in lost[of_rest > 1e-12]:
            if loss_bounds.at_most(int(count), won, photos) > budget:
                break
            kept += at_won * of_rest[count]
    assert kept <= 0.05


def test_the_photos_needed_are_the_fewest() -> None:
    for budget in (0.0025, 0.005, 0.02, 0.3, 1.0):
        needed = loss_bounds.photos_needed(budget)
        assert needed is not None
        assert loss_bounds.least_budget(needed) <= budget
        assert needed == 1 or loss_bounds.least_budget(needed - 1) > budget
    assert loss_bounds.photos_needed(0.005) == 894
    assert loss_bounds.photos_needed(0.0) is None
    assert loss_bounds.photos_needed(1e-9) is None


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    assert loss_bounds.table() in (ROOT / "docs/bundle.md").read_text()


# ---- training photos


def answers(margins: np.ndarray, noise: float, seed: int) -> Answers:
    """Of two classes; the other graph's margin differs by normal noise."""
    rng = np.random.default_rng(seed)
    changed = margins + rng.normal(scale=noise, size=len(margins)) < 0
    fp32 = np.stack([margins, np.zeros_like(margins)], axis=1).astype(np.float32)
    other = np.where(changed[:, None], fp32[:, ::-1], fp32)
    return Answers.of(fp32, other, None)


def test_training_photos_are_weighted_to_the_margins_of_held_out_photos() -> None:
    """Their margins are three times as large, so unweighted they hide most changed answers."""
    rng = np.random.default_rng(0)
    new, learnt = rng.exponential(1.0, 400), rng.exponential(3.0, 40_000)
    truth = answers(rng.exponential(1.0, 200_000), 0.1, 1).lost.mean()
    training = answers(learnt, 0.1, 2)
    found = evidence(answers(new, 0.1, 3), training)
    assert training.lost.mean() < 0.5 * truth
    assert found.lost / found.photos == pytest.approx(truth, rel=0.15)
    assert found.photos < 0.7 * 40_400
    assert (found.held_out, found.training) == (400, 40_000)


def test_photos_of_equal_margins_are_worth_their_number() -> None:
    margins = np.random.default_rng(0).exponential(1.0, 4000)
    held_out, training = answers(margins[:2000], 0.0, 0), answers(margins[2000:], 0.0, 1)
    found = evidence(held_out, training)
    assert found.photos == pytest.approx(4000, rel=0.01)
    assert (found.lost, found.won) == (0, 0)
    same = evidence(answers(np.ones(300), 0.0, 0), answers(np.ones(700), 0.0, 1))
    assert same.photos == pytest.approx(1000)


@pytest.mark.parametrize("count", [0, 1, 19, 20])
def test_few_held_out_photos_weight_no_training_photos(count: int) -> None:
    training = answers(np.ones(1000), 0.0, 0)
    found = evidence(answers(np.ones(count), 0.0, 0), training)
    assert can_weight(count) is (count >= 20)
    assert found.training == (1000 if count >= 20 else 0)


def test_held_out_photos_count_by_their_labels() -> None:
    fp32 = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2]]
    other = np.eye(3, dtype=np.float32)[[0, 1, 0, 2, 1]]
    labels = np.array([0, 0, 0, 1, 1])
    found = evidence(Answers.of(fp32, other, labels))
    assert (found.photos, found.lost, found.won) == (5, 1, 2)
    unlabelled = Answers.of(fp32, other, None)
    assert (unlabelled.lost.sum(), unlabelled.won.sum()) == (3, 0)
    assert np.array_equal(unlabelled.margins, np.ones(5))
