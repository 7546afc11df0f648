from collections import Counter

import pytest

from training.data.splits import folds, stratified

LABELS = ["a"] * 10 + ["b"] * 23 + ["c"] * 2 + ["d"] * 7


@pytest.mark.parametrize("k", [2, 3, 5, 10])
def test_folds_part_each_class_evenly(k):
    fold = folds(LABELS, k, seed=3)
    assert set(fold) <= set(range(k))
    for label in "abcd":
        ours = Counter(f for f, name in zip(fold, LABELS, strict=True) if name == label)
        sizes = [ours[i] for i in range(k)]
        assert sum(sizes) == LABELS.count(label)
        assert max(sizes) - min(sizes) <= 1


def test_folds_follow_the_seed_and_a_class_its_own_name():
    assert folds(LABELS, 5, 1) == folds(LABELS, 5, 1)
    assert folds(LABELS, 5, 1) != folds(LABELS, 5, 2)
    more = folds([*LABELS, *["new"] * 9], 5, 1)
    assert more[: len(LABELS)] == folds(LABELS, 5, 1)
    assert folds(["new"] * 9 + LABELS, 5, 1)[9:] == folds(LABELS, 5, 1)


def test_what_is_left_over_does_not_all_go_to_one_fold():
    labels = [f"class-{i // 6}" for i in range(6 * 100)]  # 6 photos in 5 folds: one has 2
    sizes = Counter(folds(labels, 5, 0))
    assert max(sizes.values()) < 160


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_share_of_each_class_is_held_out_never_none_and_never_all(share):
    held = stratified(LABELS, share, seed=0)
    for label in "abcd":
        n = LABELS.count(label)
        count = sum(h for h, name in zip(held, LABELS, strict=True) if name == label)
        assert count == min(max(1, round(n * share)), n - 1)
    assert stratified([*LABELS, "e", "e"], share, 0)[: len(LABELS)] == held
