from collections import Counter

import pytest

from training.data.splits import stratified_folds, stratified_holdout

LABELS = ["a"] * 10 + ["b"] * 23 + ["c"] * 2 + ["d"] * 7


@pytest.mark.parametrize("k", [2, 3, 5, 10])
def test_folds_split_each_class_evenly(k):
    fold = stratified_folds(LABELS, k, seed=3)
    assert set(fold) <= set(range(k))
    for label in "abcd":
        counts = Counter(f for f, name in zip(fold, LABELS, strict=True) if name == label)
        sizes = [counts[i] for i in range(k)]
        assert sum(sizes) == LABELS.count(label)
        assert max(sizes) - min(sizes) <= 1


def test_folds_depend_on_the_seed_and_on_the_class_name_only():
    assert stratified_folds(LABELS, 5, 1) == stratified_folds(LABELS, 5, 1)
    assert stratified_folds(LABELS, 5, 1) != stratified_folds(LABELS, 5, 2)
    more = stratified_folds([*LABELS, *["new"] * 9], 5, 1)
    assert more[: len(LABELS)] == stratified_folds(LABELS, 5, 1)
    assert stratified_folds(["new"] * 9 + LABELS, 5, 1)[9:] == stratified_folds(LABELS, 5, 1)


def test_remainders_are_spread_over_the_folds():
    labels = [f"class-{i // 6}" for i in range(6 * 100)]  # 6 photos in 5 folds: one has 2
    sizes = Counter(stratified_folds(labels, 5, 0))
    assert max(sizes.values()) < 160


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_share_of_each_class_is_held_out_at_least_one_and_never_all(share):
    held_out = stratified_holdout(LABELS, share, seed=0)
    for label in "abcd":
        n = LABELS.count(label)
        count = sum(h for h, name in zip(held_out, LABELS, strict=True) if name == label)
        assert count == min(max(1, round(n * share)), n - 1)
    assert stratified_holdout([*LABELS, "e", "e"], share, 0)[: len(LABELS)] == held_out
