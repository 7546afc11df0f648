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
    by_folder = DataConfig(group="folder", layout="classes")
    for config in (by_folder, by_folder.model_copy(update={"folds": 3, "fold": 1})):
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


def write_photos(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo(i, (20, 16)))
    return root


CLASSES = [f"{label}/{i}.jpg" for label in "abc" for i in range(6)]
VIDEOS = [*CLASSES[:6], *(f"{label}/v{i % 3}/{i}.jpg" for label in "bc" for i in range(6))]


@pytest.mark.parametrize(
    ("names", "group", "says"),
    [
        (VIDEOS, "folders", "matches no path, such as 'a/0.jpg'; did you mean data.group=folder?"),
        (VIDEOS, "patient_([0-9]+)", "matches no path, such as 'a/0.jpg'; correct"),
        (VIDEOS, "(.+)", "makes each of the 18 photos a group of its own"),
        (CLASSES, "folder", "each class is one group, such as 'a', and so can't be split"),
    ],
)
def test_a_group_that_groups_nothing_or_all_is_refused(tmp_path, names, group, says):
    with pytest.raises(OptionError) as caught:
        load_dataset(str(write_photos(tmp_path, *names)), config=DataConfig(group=group))
    assert says in str(caught.value)


def test_preview_refuses_it_and_a_class_of_one_group_is_told(tmp_path, capsys):
    root = str(write_photos(tmp_path / "set", *VIDEOS))
    assert fledge.main(["preview", root, "data.group=folders", "--out", str(tmp_path / "o")]) == 2
    assert "did you mean data.group=folder?" in capsys.readouterr().err
    found = load_dataset(root, config=DataConfig(group="folder"))
    assert found.reading.warning == (
        "data.group = 'folder': class 'a' is one group and so can't be split: all photos in train, "
        "none in valid"
    )
    assert "a" not in {found.classes[label] for _, label in found.valid}
    assert fledge.main(["preview", root, "data.group=folder", "--out", str(tmp_path / "o")]) == 0
    assert "class 'a' is one group" in capsys.readouterr().out


def test_it_is_known_where_the_parts_are_given(tmp_path):
    drawn = load_dataset(str(write_photos(tmp_path / "set", *CLASSES)))
    assert drawn.reading.given == ""
    names = [f"{part}/{name}" for part in ("train", "valid") for name in CLASSES]
    root = write_photos(tmp_path / "parts", *names)
    assert load_dataset(str(root)).reading.given == "the folders"
    rows = [f"{name},{name[6:7]},{name[:5]}" for name in names]
    (root / "labels.csv").write_text("\n".join(["path,label,fold", *rows]))
    table = load_dataset(str(root), config=DataConfig(csv="labels.csv", images="."))
    assert table.reading.given == "labels.csv"
    split = tmp_path / "split.csv"
    split.write_text("path,fold\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(CLASSES)))
    assert load_dataset(str(tmp_path / "set"), split=split).reading.given == str(split)
