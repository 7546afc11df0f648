"""Laws of the random split and of split files, for any classes, shares, folds and names."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import file_names, texts
from training.config.sections import DataConfig
from training.data.dataset import Dataset, Sample, load_dataset, read_split, write_split
from training.data.layouts import Photo
from training.data.splits import PARTS, draw_split, stratified_folds, stratified_holdout

ROOT = Path("/photos")
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.floats(0.001, 0.999)
SIZES = st.dictionaries(texts(min_size=1, max_size=4), st.integers(2, 20), min_size=1, max_size=5)
FILES = st.tuples(file_names(), file_names())  # class and photo


@st.composite
def labels(draw: st.DrawFn) -> list[str]:
    """Class names of photos, the classes mixed in any order."""
    found = [name for name, count in draw(SIZES).items() for _ in range(count)]
    draw(st.randoms(use_true_random=False)).shuffle(found)
    return found


def by_class(labels: list[str], values: list[object]) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for label, value in zip(labels, values, strict=True):
        found.setdefault(label, []).append(value)
    return found


@given(labels(), SHARES, SEEDS)
@examples(40)
def test_each_class_is_held_out_by_the_share_and_never_all_of_it(labels, share, seed) -> None:
    held_out = stratified_holdout(labels, share, seed)
    assert held_out == stratified_holdout(labels, share, seed)
    for outcomes in by_class(labels, held_out).values():
        count, wanted = sum(outcomes), len(outcomes) * share
        assert 1 <= count <= len(outcomes) - 1
        clamped = min(max(wanted, 1), len(outcomes) - 1)
        assert abs(count - clamped) <= 0.5


@given(labels(), st.integers(2, 12), SEEDS)
@examples(40)
def test_each_class_is_divided_evenly_into_folds(labels, k, seed) -> None:
    folds = stratified_folds(labels, k, seed)
    assert folds == stratified_folds(labels, k, seed)
    for own in by_class(labels, folds).values():
        sizes = Counter(own)
        assert set(sizes) <= set(range(k))
        assert max(sizes.values()) - min(sizes[fold] for fold in range(k)) <= 1
        # Whichever fold validates, some photos of the class are left to train on.
        assert max(sizes.values()) < len(own)


@given(labels(), labels(), SHARES, st.integers(2, 5), SEEDS, st.randoms(use_true_random=False))
@examples(40)
def test_the_split_of_a_class_depends_on_no_other_class(
    labels, others, share, k, seed, random
) -> None:
    """Other classes may be added, and the classes listed in any order."""
    known = set(labels)
    mixed = [*labels, *(name for name in others if name not in known)]
    random.shuffle(mixed)
    for split in (
        lambda names: stratified_holdout(names, share, seed),
        lambda names: stratified_folds(names, k, seed),
    ):
        alone, together = by_class(labels, split(labels)), by_class(mixed, split(mixed))
        assert {name: together[name] for name in known} == alone


@given(labels(), st.lists(st.sampled_from(PARTS), max_size=5), st.integers(0, 4), SHARES, SEEDS)
@examples(40)
def test_a_drawn_split_is_a_partition_that_keeps_the_parts_of_others(
    labels, parts, fold, share, seed
) -> None:
    free = [Photo(ROOT / label / f"{i}.jpg", label, "") for i, label in enumerate(labels)]
    given_parts = [Photo(ROOT / f"{i}.jpg", labels[0], part) for i, part in enumerate(parts)]
    photos = sorted([*free, *given_parts])
    folds = {"folds": 5, "fold": fold}
    for config in (DataConfig(valid=share), DataConfig(**folds)):
        split = draw_split(ROOT, photos, config, seed)
        assert sorted(photo.path for photo in split) == sorted(photo.path for photo in photos)
        assert set(given_parts) <= set(split)
        drawn = [photo for photo in split if photo.path not in {one.path for one in given_parts}]
        assert {photo.part for photo in drawn} <= {"train", "valid"}
        assert {photo.label for photo in drawn if photo.part == "train"} == set(labels)
    validating = [
        {photo.path for photo in draw_split(ROOT, free, config, seed) if photo.part == "valid"}
        for config in (DataConfig(folds=5, fold=number) for number in range(5))
    ]
    assert Counter(path for part in validating for path in part) == {one.path: 1 for one in free}


@given(SIZES, SEEDS, st.randoms(use_true_random=False))
@examples(8)
def test_the_split_does_not_depend_on_the_order_in_which_files_were_made(
    sizes, seed, random
) -> None:
    names = [f"{i}/{j}.jpg" for i, count in enumerate(sizes.values()) for j in range(count)]
    names += ["other/a.jpg", "other/b.jpg"]
    found = []
    for _ in range(2):
        random.shuffle(names)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.touch()
            dataset = load_dataset(folder, seed=seed)
            found.append(
                [
                    [(path.relative_to(dataset.root), label) for path, label in samples]
                    for samples in (dataset.train, dataset.valid)
                ]
            )
    assert found[0] == found[1]


@given(st.dictionaries(FILES, st.sampled_from(PARTS), min_size=1, max_size=8))
@examples(40)
def test_a_written_split_is_read_back_whatever_the_files_are_called(photos) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        classes = tuple(sorted({label for label, _ in photos}))
        parts = {
            part: tuple(
                Sample(root / label / name, classes.index(label))
                for (label, name), own in photos.items()
                if own == part
            )
            for part in PARTS
        }
        dataset = Dataset("data", root, classes, **parts)
        write_split(dataset, root / "split.csv")
        assert read_split(root / "split.csv", root, classes, "data", needed=()) == dataset
