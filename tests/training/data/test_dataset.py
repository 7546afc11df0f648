import os
from collections import Counter
from pathlib import Path

import pytest

from serving.errors import DataError, OptionError
from serving.utils.natural_sort import natural_letters_first
from tests.support.tiny_bundle import photo
from training.config.sections import DataConfig
from training.data import layouts
from training.data.dataset import SPLIT_FILE, load_dataset, photos_changed, read_split, write_split
from training.run.dataset import load_run_dataset


def make(root, counts, size=(20, 16)):
    number = 0
    for name, count in counts.items():
        for i in range(count):
            path = root / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(number, size))
            number += 1
    return root


def test_every_photo_is_in_exactly_one_part_and_classes_keep_their_shares(tmp_path):
    root = make(tmp_path / "d", {"a": 10, "b": 20, "c": 2})
    found = load_dataset(str(root), config=DataConfig(valid=0.2), seed=3)
    parts = [set(found.train), set(found.valid)]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 32
    assert Counter(s.label for s in found.valid) == {0: 2, 1: 4, 2: 1}


def test_the_split_follows_the_seed_and_nothing_else(tmp_path):
    root = make(tmp_path / "d", {"a": 10, "b": 10})
    assert load_dataset(str(root), seed=1) == load_dataset(str(root), seed=1)
    assert load_dataset(str(root), seed=1) != load_dataset(str(root), seed=2)
    before = {s.path for s in load_dataset(str(root), seed=1).valid if s.path.parent.name == "a"}
    make(root, {"c": 10})
    later = {s.path for s in load_dataset(str(root), seed=1).valid if s.path.parent.name == "a"}
    assert before == later  # another class does not change this class's split


def test_class_names_are_in_natural_order(tmp_path):
    root = make(tmp_path / "d", {"10": 2, "2": 2, "1": 2})
    assert load_dataset(str(root)).classes == ("1", "2", "10")


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_the_folders_train_valid_and_test_are_the_parts(tmp_path, valid):
    make(tmp_path / "d" / "train", {"a": 3, "b": 3})
    make(tmp_path / "d" / valid, {"a": 1, "b": 2})
    make(tmp_path / "d" / "test", {"a": 1})
    found = load_dataset(str(tmp_path / "d"))
    assert (len(found.train), len(found.valid), len(found.test)) == (6, 3, 1)


def test_a_split_file_with_fold_numbers(tmp_path):
    root = make(tmp_path / "d", {"a": 4, "b": 4})
    rows = [f"{c}/{i}.jpg,{'test' if i == 3 else i % 3}" for c in "ab" for i in range(4)]
    (tmp_path / "s.csv").write_text("\n".join(["path,fold", *rows]))
    found = load_dataset(str(root), split=tmp_path / "s.csv", config=DataConfig(fold=1))
    assert {s.path.name for s in found.valid} == {"1.jpg"}
    assert {s.path.name for s in found.test} == {"3.jpg"}
    assert {s.path.name for s in found.train} == {"0.jpg", "2.jpg"}
    with pytest.raises(OptionError, match=r"fold = 7.*folds 0, 1, 2"):
        load_dataset(str(root), split=tmp_path / "s.csv", config=DataConfig(fold=7))


def test_a_split_file_from_a_spreadsheet(tmp_path):
    root = make(tmp_path / "d", {"a": 2, "b": 2})
    rows = "path,fold\r\na/0.jpg,01\r\na/1.jpg,2\r\nb/0.jpg,1\r\nb/1.jpg,2\r\n"
    (tmp_path / "s.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    found = load_dataset(str(root), split=tmp_path / "s.csv", config=DataConfig(fold=1))
    assert {s.path.name for s in found.valid} == {"0.jpg"}


def test_part_folders_are_distinguished_from_class_folders(tmp_path):
    make(tmp_path / "c", {"train": 3, "test": 3})  # classes of those names, or parts?
    with pytest.raises(
        DataError, match=r"names of parts, not of classes.*add data\.layout=classes"
    ):
        load_dataset(str(tmp_path / "c"))
    config = DataConfig(layout="classes")
    assert load_dataset(str(tmp_path / "c"), config=config).classes == ("test", "train")
    make(tmp_path / "d" / "train", {"a": 10, "b": 10})
    make(tmp_path / "d" / "test", {"a": 3, "b": 3})
    (tmp_path / "d" / "__MACOSX").mkdir()
    found = load_dataset(str(tmp_path / "d"))  # validation photos are drawn from train/
    assert [len(getattr(found, part)) for part in ("train", "valid", "test")] == [16, 4, 6]
    make(tmp_path / "d" / "valid", {"a": 3, "b": 3})
    assert len(load_dataset(str(tmp_path / "d")).valid) == 6
    make(tmp_path / "d", {"extra": 1})
    with pytest.raises(DataError, match="beside them 'extra/'"):
        load_dataset(str(tmp_path / "d"))
    make(tmp_path / "e" / "train", {"a": 3, "b": 3})
    make(tmp_path / "e" / "valid", {"a": 1, "b": 1})
    make(tmp_path / "e" / "val", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="both val/ and valid/"):
        load_dataset(str(tmp_path / "e"))


def test_a_class_without_a_readable_photo_is_not_dropped_silently(tmp_path):
    root = make(tmp_path / "d", {"a": 3, "b": 3})
    (root / "c").mkdir()
    (root / "c" / "0.qoi").write_bytes(b"qoif")
    with pytest.raises(DataError, match="'c' contains no readable photo"):
        load_dataset(str(root))


def test_names_with_letters_come_before_numbers(tmp_path):
    """The order decides class indices and splits, so it must never change."""
    names = ["7up", "cola", "10", "9", "a2", "a10"]
    root = make(tmp_path / "d", dict.fromkeys(names, 5))
    found = load_dataset(str(root))
    assert found.classes == ("a2", "a10", "cola", "7up", "9", "10")
    files = ["b.jpg", "1.jpg", "a.jpg", "10.jpg", "2.jpg"]
    assert sorted(files, key=natural_letters_first) == [
        *("a.jpg", "b.jpg", "1.jpg", "2.jpg", "10.jpg")
    ]


def test_order_does_not_depend_on_the_file_system():
    assert sorted(["01.jpg", "1.jpg", "10.jpg", "2.jpg"], key=natural_letters_first) == [
        "01.jpg", "1.jpg", "2.jpg", "10.jpg",
    ]  # fmt: skip


def test_hidden_and_other_files_are_ignored(tmp_path):
    root = make(tmp_path / "d", {"a": 3, "b": 3})
    (root / "a" / "._0.jpg").write_bytes(b"mac")
    (root / "a" / "notes.txt").write_text("hello")
    (root / ".cache").mkdir()
    found = load_dataset(str(root))
    assert len(found.train) + len(found.valid) == 6
    assert found.classes == ("a", "b")


def test_a_written_split_is_read_back(tmp_path):
    root = make(tmp_path / "d", {"a": 5, 'b, "quoted"': 5})
    os.rename(root / "a" / "0.jpg", root / "a" / "new\nline.jpg")
    found = load_dataset(str(root))
    write_split(found, tmp_path / SPLIT_FILE)
    (tmp_path / "best.json").write_text(
        '{"schema": 1, "name": "n", "arch": "x", "classes": ["a", "b, \\"quoted\\""],'
        f'"preprocess": {{}}, "data": {{"source": "{root}", "root": "{root}"}}}}'
    )
    assert load_run_dataset(tmp_path) == found
    found.valid[0].path.rename(tmp_path / "away")
    with pytest.raises(
        DataError,
        match=r"1 valid photo is missing in .*; restore the missing photos, or train again",
    ):
        load_run_dataset(tmp_path)
    assert load_run_dataset(tmp_path, part="") == load_run_dataset(tmp_path, part="train") == found
    (tmp_path / "away").rename(found.valid[0].path)
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="--data"):
        load_run_dataset(tmp_path)
    assert load_run_dataset(tmp_path, moved).fingerprint == load_dataset(str(moved)).fingerprint


def test_the_fingerprint_changes_with_the_photos(tmp_path):
    root = make(tmp_path / "d", {"a": 5, "b": 5})
    before = load_dataset(str(root)).fingerprint
    assert load_dataset(str(root)).fingerprint == before
    assert not photos_changed({"fingerprint": before}, load_dataset(str(root)))
    assert not photos_changed(
        {}, load_dataset(str(root))
    )  # an old checkpoint without a fingerprint
    (root / "a" / "0.jpg").write_bytes(b"longer than before" * 1000)
    assert load_dataset(str(root)).fingerprint != before
    assert photos_changed({"fingerprint": before}, load_dataset(str(root)))


def test_reading_a_split_requires_the_photos_of_the_needed_parts(tmp_path):
    root = make(tmp_path / "d", {"a": 5, "b": 5})
    found = load_dataset(str(root))
    write_split(found, tmp_path / "s.csv")
    args = (tmp_path / "s.csv", root, found.classes, "photos")
    assert read_split(*args).source == "photos"
    found.train[0].path.unlink()
    with pytest.raises(DataError, match="1 train photo is missing"):
        read_split(*args)
    assert len(read_split(*args, needed=("valid",)).train) == len(found.train)
    with pytest.raises(DataError, match=r"s\.csv can't be read"):
        read_split(tmp_path / "s.csv", root, ("a", "c"), "photos")
    text = (tmp_path / "s.csv").read_text()
    (tmp_path / "s.csv").write_text(text.replace("a/", "/nowhere/a/", 1))
    with pytest.raises(DataError, match=r"missing in .*, for example .*a/"):
        read_split(*args)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "contains no folder with photos"),
        ({"a": 5}, "has one class, 'a'"),
        ({"a": 5, "b": 1}, "class 'b' has one photo"),
    ],
)
def test_folders_without_enough_photos_are_errors(tmp_path, counts, message):
    (tmp_path / "d").mkdir()
    make(tmp_path / "d", counts)
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / "d"))


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(str(tmp_path / "nowhere"))
    root = make(tmp_path / "d", {"a": 3, "b": 3})
    with pytest.raises(DataError, match="no such file"):
        load_dataset(str(root), split=tmp_path / "nowhere.csv")
    make(tmp_path / "f" / "valid", {"a": 3, "b": 3})
    make(tmp_path / "f" / "test", {"a": 3, "b": 3})
    with pytest.raises(DataError, match="has valid/, test/ but no train/"):
        load_dataset(str(tmp_path / "f"))
    make(tmp_path / "e" / "train", {"a": 3, "b": 3})
    assert len(load_dataset(str(tmp_path / "e")).valid) == 2
    (tmp_path / "e" / "val").mkdir()
    with pytest.raises(DataError, match=r"e/val is empty; expected val/CLASS/photo\.jpg"):
        load_dataset(str(tmp_path / "e"))
    make(tmp_path / "e", {"val": 1})
    with pytest.raises(
        DataError, match="e/val contains no folder with photos; expected val/CLASS/"
    ):
        load_dataset(str(tmp_path / "e"))
    make(tmp_path / "flat", {".": 3})
    with pytest.raises(DataError, match=r"flat/CLASS/photo\.jpg, or .*data\.pattern.*data\.csv"):
        load_dataset(str(tmp_path / "flat"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,size\n", "first line must be 'path,fold'; it has 'file', 'size'"),
        ("file;part\n", "s.csv has no row under its first line; write lines of path,fold"),
        ("", "first line must be 'path,fold'; it has nothing"),
        (f"path,fold\na/0.jpg,{'1' * 5000}\n", "line 2: fold '111.*…1.* is not train"),
        (
            f"path,fold\na/{'n' * 300}.jpg,0\n",
            "line 2: no photo 'a/nnn.*…n.*; photos are looked for below .*/d",
        ),
        ("path,fold\na/0.jpg,maybe\n", "line 2: fold 'maybe'"),
        ("path,fold\n../x/0.jpg,0\n", "line 2: no photo '../x/0.jpg'; photos are"),
        ("path,fold\n/a/0.jpg,0\n/etc/passwd,1\n", "line 3: path '/etc/passwd' is not CLASS/photo"),
        (
            "path,fold\na/0.jpg,0\na/99.jpg,1\n",
            "line 3: no photo 'a/99.jpg'; photos are looked for below ",
        ),
        (
            "path,fold\na/0.jpg,train\nb/0.jpg,train\n",
            r"--split .*s\.csv: the valid part is empty; give some rows the fold valid, or number",
        ),
        (
            "path,fold\n" + "a/0.jpg,x\n" * 22,
            r"s.csv has 22 mistakes:\n  line 2: fold 'x' is.*(\n  line \d+: .*){19}\n  and 2 more$",
        ),
        ("path,fold\na/0.jpg,0\na/./0.jpg,1\n", "line 3: 'a/./0.jpg' is in line 2, too"),
        ("path,fold\na/0.jpg,²\n", "line 2: fold"),
    ],
)
def test_an_invalid_split_file_is_an_error_with_the_reason(tmp_path, text, message):
    root = make(tmp_path / "d", {"a": 3, "b": 3})
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(str(root), split=tmp_path / "s.csv")


def test_a_folder_given_as_split_file_is_an_error(tmp_path):
    root = make(tmp_path / "d", {"a": 3, "b": 3})
    with pytest.raises(DataError, match=rf"^--split {tmp_path}: a folder, not a CSV 'path,fold'$"):
        load_dataset(str(root), split=tmp_path)
    with pytest.raises(DataError, match=r"^--split /dev/null/x can't be read: Not a directory$"):
        load_dataset(str(root), split=Path("/dev/null/x"))


def test_spaces_around_the_columns_of_a_split_file_are_ignored(tmp_path):
    root = make(tmp_path / "d", {"a": 2, "b": 2})
    rows = ["path, fold", *(f"{c}/{i}.jpg , {i}" for c in "ab" for i in range(2))]
    (tmp_path / "s.csv").write_text("\n".join(rows))
    assert len(load_dataset(str(root), split=tmp_path / "s.csv").valid) == 2


@pytest.mark.parametrize("named", [{}, {"folds": 2}])
def test_a_class_name_that_is_not_utf_8_is_an_error(tmp_path, named):
    root = make(tmp_path / "d", {"a": 3, "caf\udce9": 3})
    with pytest.raises(DataError, match=r"class 'caf\\udce9' is not a UTF-8 name; rename it"):
        load_dataset(str(root), config=DataConfig(**named))


def test_a_split_with_carriage_returns_is_read_back(tmp_path):
    root = make(tmp_path / "d", {"a\rb": 4, " c,\n": 4})
    os.rename(root / "a\rb" / "0.jpg", root / "a\rb" / "0\r.jpg")
    found = load_dataset(str(root))
    write_split(found, tmp_path / SPLIT_FILE)
    again = read_split(tmp_path / SPLIT_FILE, found.root, found.classes, found.source)
    assert again == found


def test_long_names_in_errors_are_shortened_to_one_line(tmp_path):
    root = make(tmp_path / "d", {"a\nb" + "c" * 200: 1, "d": 3})
    with pytest.raises(DataError) as caught:
        load_dataset(str(root))
    assert str(caught.value).startswith(r"class 'a\nbccc")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("source", ["~no-such-user/x", "n" * 300])
def test_an_impossible_folder_name_is_reported_as_no_such_folder(source):
    with pytest.raises(DataError, match=r"--data '.*': no such folder"):
        load_dataset(source)


def test_an_os_error_becomes_a_data_error_of_one_line(tmp_path, monkeypatch):
    root = make(tmp_path / "d", {"a": 3, "b": 3})

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", str(root / "a"))

    monkeypatch.setattr(layouts, "Layout", closed)
    with pytest.raises(DataError, match=r"--data '.*d': '.*a': Permission denied"):
        load_dataset(str(root))
