from collections import Counter
from pathlib import PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fledge
from serving.errors import OptionError
from tests.support.hypothesis_profiles import examples
from tests.support.tiny_bundle import photo
from training.config.sections import DataConfig
from training.data.dataset import load_dataset
from training.data.grouped_splits import group_names, grouped_folds, grouped_holdout

SETS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=60)


@examples(200)
@given(SETS, st.floats(0.05, 0.6), st.integers(0, 5))
def test_groups_stay_together_and_every_class_is_trained_on(photos, share, seed):
    labels, groups = [label for label, _ in photos], [str(group) for _, group in photos]
    held = grouped_holdout(labels, groups, share, seed)
    assert held == grouped_holdout(labels, groups, share, seed)
    assert all(len({out for out, g in zip(held, groups, strict=True) if g == group}) == 1
               for group in groups)  # fmt: skip
    assert {label for label, out in zip(labels, held, strict=True) if not out} == set(labels)


@examples(200)
@given(SETS, st.integers(2, 6), st.integers(0, 5))
def test_folds_of_groups_are_whole(photos, k, seed):
    labels, groups = [label for label, _ in photos], [str(group) for _, group in photos]
    folds = grouped_folds(labels, groups, k, seed)
    assert set(folds) <= set(range(k))
    assert len(set(zip(folds, groups, strict=True))) == len(set(groups))


def test_the_share_is_met_where_the_groups_are_small():
    labels = [label for label in "ab" for _ in range(200)]
    groups = [str(i // 4) for i in range(400)]
    held = Counter(
        label
        for label, out in zip(labels, grouped_holdout(labels, groups, 0.2, 3), strict=True)
        if out
    )
    assert all(36 <= held[label] <= 44 for label in "ab")
    folds = Counter(zip(labels, grouped_folds(labels, groups, 5, 3), strict=True))
    assert set(folds.values()) == {40}


def test_groups_are_named_by_folder_or_pattern():
    paths = list(map(PurePath, ("a/v1/0.jpg", "a/v1/1.jpg", "a/v2/0.jpg", "b/x_3.jpg", "b/y.jpg")))
    assert group_names(paths, "folder") == ["a/v1", "a/v1", "a/v2", "b", "b"]
    by_name = group_names(paths, r"(.+)_[0-9]+")
    assert by_name[3] == "=b/x"
    assert by_name[:3] == [path.as_posix() for path in paths[:3]]
    assert group_names(paths, "v[12]")[:3] == ["=v1", "=v1", "=v2"]


def test_photos_of_a_folder_are_in_one_part(tmp_path):
    for label in "ab":
        for video in range(6):
            folder = tmp_path / "data" / label / f"video {video}"
            folder.mkdir(parents=True)
            for frame in range(4):
                (folder / f"{frame}.jpg").write_bytes(photo(frame, (20, 16)))
    root = str(tmp_path / "data")
    for config in (DataConfig(group="folder"), DataConfig(group="folder", folds=3, fold=1)):
        found = load_dataset(root, config=config)
        train, valid = ({s.path.parent for s in part} for part in (found.train, found.valid))
        assert not train & valid
        assert len(valid) >= 2
    for label in "ab":
        for part in ("train", "valid"):
            place = tmp_path / "split" / part / label
            place.mkdir(parents=True)
            (place / "0.jpg").write_bytes(photo(1, (20, 16)))
    with pytest.raises(OptionError, match="is split already"):
        load_dataset(str(tmp_path / "split"), config=DataConfig(group="folder"))


def test_a_wrong_pattern_is_one_line(tmp_path, capsys):
    assert fledge.main(["preview", str(tmp_path), "data.group=(x"]) == 2
    assert "neither 'folder' nor a regular expression" in capsys.readouterr().err
