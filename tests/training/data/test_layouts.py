from collections import Counter

import pytest

from serving.errors import DataError, OptionError
from tests.support.tiny_bundle import photo
from training.config.sections import DataConfig
from training.data.dataset import SPLIT_FILE, load_dataset, read_split, write_split

PETS = r"([a-zA-Z_]+)_\d+"
BREEDS = DataConfig(csv="labels.csv", suffix=".jpg")


def photos(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number, (20, 16)))
    return str(root)


def names_of(found):
    return {
        part: sorted(
            (s.path.relative_to(found.root).as_posix(), found.classes[s.label])
            for s in getattr(found, part)
        )
        for part in ("train", "valid", "test")
    }


def pets(root, folder=""):
    breeds = ("Abyssinian", "great_pyrenees", "pug")
    return photos(root, *(f"{folder}{breed}_{i}.jpg" for breed in breeds for i in range(1, 11)))


def breeds(root, rows=None, train="train/"):
    ids = [f"{i:03d}" for i in range(12)]
    photos(root, *(f"{train}{name}.jpg" for name in ids), "test/x.jpg", "test/y.jpg")
    rows = (
        [f"{name},{'10' if i % 2 else '9'}" for i, name in enumerate(ids)] if rows is None else rows
    )
    (root / "labels.csv").write_text("\n".join(["id,label", *rows]) + "\n")
    return str(root)


def test_labels_are_read_from_file_names(tmp_path):
    found = load_dataset(pets(tmp_path / "d"), config=DataConfig(pattern=PETS, valid=0.5), seed=73)
    assert found.classes == ("Abyssinian", "great_pyrenees", "pug")
    assert Counter(s.label for s in found.valid) == {0: 5, 1: 5, 2: 5}
    for path, label in found.train + found.valid:
        assert path.name.rpartition("_")[0] == found.classes[label]


def test_the_same_names_in_folders_are_split_the_same(tmp_path):
    config = DataConfig(pattern=PETS)
    flat = load_dataset(pets(tmp_path / "d"), config=config)
    deep = load_dataset(pets(tmp_path / "e", "images/"), config=config)
    assert [s.path.name for s in flat.valid] == [s.path.name for s in deep.valid]
    photos(tmp_path / "e", "trimaps/pug_1.png")  # as in the original dataset
    images = DataConfig(pattern=PETS, images="images")
    assert load_dataset(str(tmp_path / "e"), config=images) == deep


def test_unmatched_file_names_are_counted_and_one_is_named(tmp_path):
    root = photos(
        tmp_path / "d", "cat_1.jpg", "cat_2.jpg", "dog_1.jpg", "dog_2.jpg", "7.jpg", "8.jpg"
    )
    with pytest.raises(
        DataError, match=r"does not match 2 of 6 photos in .*d, for example '7\.jpg'"
    ):
        load_dataset(root, config=DataConfig(pattern=PETS))
    with pytest.raises(DataError, match="does not match 6 of 6"):
        load_dataset(root, config=DataConfig(pattern="(zebra)?_nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no photo"):
        load_dataset(str(tmp_path / "empty"), config=DataConfig(pattern=PETS))


def test_with_a_pattern_the_folders_train_valid_and_test_are_the_parts(tmp_path):
    kinds = [f"{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(4)]
    config = DataConfig(pattern=r"^(cat|dog)\.\d+")
    root = photos(tmp_path / "d", *(f"train/{n}" for n in kinds), "test/1.jpg", "test/2.jpg")
    found = load_dataset(root, config=config)
    assert len(found.train) + len(found.valid) == 8
    assert [p.name for p in found.unlabelled] == ["1.jpg", "2.jpg"]
    photos(tmp_path / "d", "valid/cat.9.jpg", "valid/dog.9.jpg")
    assert {p for p, _ in names_of(load_dataset(root, config=config))["valid"]} == {
        "valid/cat.9.jpg", "valid/dog.9.jpg",
    }  # fmt: skip
    photos(tmp_path / "d", "test/cat.7.jpg")
    with pytest.raises(DataError, match="does not match 2 of"):
        load_dataset(root, config=config)
    (tmp_path / "d/test/1.jpg").unlink()
    (tmp_path / "d/test/2.jpg").unlink()
    found = load_dataset(root, config=config)
    assert names_of(found)["test"] == [("test/cat.7.jpg", "cat")]
    assert found.unlabelled == ()


def test_labels_are_read_from_a_table(tmp_path):
    found = load_dataset(breeds(tmp_path / "d"), config=BREEDS, seed=1)
    assert found.classes == ("9", "10")  # natural order
    assert len(found.train) + len(found.valid) == 12
    assert Counter(s.label for s in found.valid) == {0: 1, 1: 1}
    for path, label in found.train + found.valid:
        assert found.classes[label] == ("10" if int(path.stem) % 2 else "9")
    assert [p.name for p in found.unlabelled] == ["x.jpg", "y.jpg"]
    assert found.test == ()


def test_a_table_of_a_spreadsheet_with_other_column_names_is_read(tmp_path):
    photos(tmp_path / "d", *(f"{i}.png" for i in range(4)))
    text = "file,size,breed\r\n" + "".join(f" {i}.png ,9,{'ab'[i % 2]} \r\n" for i in range(4))
    (tmp_path / "d" / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = DataConfig(csv="t.csv", columns=("file", "breed"), valid=0.5)
    found = load_dataset(str(tmp_path / "d"), config=config)
    assert found.classes == ("a", "b")
    assert len(found.train) == len(found.valid) == 2


def test_the_option_images_names_the_photo_folder_of_a_table(tmp_path):
    root = breeds(tmp_path / "d", train="pictures/all/")
    photos(tmp_path / "d" / "copy", *(f"{i:03d}.jpg" for i in range(12)))
    with pytest.raises(
        DataError, match=r"in 'copy' and in 'pictures/all' alike.*data\.images=copy"
    ):
        load_dataset(root, config=BREEDS)
    found = load_dataset(root, config=BREEDS.model_copy(update={"images": "pictures/all"}))
    assert len(found.train) + len(found.valid) == 12
    for images in ("../d/pictures", "/"):
        with pytest.raises(OptionError, match=r"data\.images"):
            load_dataset(root, config=BREEDS.model_copy(update={"images": images}))
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(root, config=BREEDS.model_copy(update={"images": "nowhere"}))


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (
            None,
            {"suffix": ".gif"},
            r"(?s)12 mistakes:\n  line 2: no photo '000.gif'.*12 of 12 rows ",
        ),
        (
            ["000,a", "001,b", "nope,a"],
            {},
            r"labels.csv, line 4: no photo 'nope.jpg'; 1 of 3 rows has none below .*/d;",
        ),
        (["000,a", "001,b", "000,b"], {}, r"labels.csv, line 4: '000' is in line 2, too"),
        (["000,a", "001,b", "./000,b"], {}, r"labels.csv, line 4: './000' is in line 2, too"),
        (["000,a", "n" * 300 + ",b"], {}, r"labels.csv, line 3: no photo 'nnn.*…nnn"),
        (None, {"images": "n" * 300}, r"data.images = 'nnn.*…nnn.*': no such folder"),
        (None, {"csv": "n" * 300}, r"data.csv = 'nnn.*…nnn.*' can't be read"),
        (None, {"csv": "\0"}, r"data.csv = '\\x00' can't be read"),
        (["000,a", "001,"], {}, r"labels.csv, line 3: '001' has no label"),
        (["000,a", "001"], {}, r"labels.csv, line 3: '001' has no label"),
        (
            [",a", "000,", "001,b", "./001,b"],
            {},
            "labels.csv has 3 mistakes:\n  line 2: id '' names.*\n  line 3: '000' has no label\n"
            "  line 5: './001' is in line 4, too$",
        ),
        ([",a"], {}, r"labels.csv, line 2: id '' names no photo"),
        (["../x,a"], {}, r"labels.csv, line 2: no photo '../x.jpg'"),
        (["/etc/x,a"], {}, r"labels.csv, line 2: no photo '/etc/x.jpg'"),
        (
            None,
            {"columns": ("id", "breed")},
            r"no column 'breed'.*'id', 'label'; .*: 'data.columns=\[\"id",
        ),
        (None, {"csv": "nowhere.csv"}, r"data.csv = 'nowhere.csv': no such file"),
        ([], {}, r"no row"),
        (["000,a", "001,b"], {}, r"class 'a' has one photo"),
        (["000,a", "001,a"], {}, r"one class, 'a'"),
    ],
)
def test_unusable_tables_are_errors(tmp_path, rows, change, message):
    root = breeds(tmp_path / "d", rows)
    with pytest.raises(DataError, match=message):
        load_dataset(root, config=BREEDS.model_copy(update=change))


def test_a_table_in_another_encoding_is_an_error(tmp_path):
    root = breeds(tmp_path / "d")
    (tmp_path / "d" / "labels.csv").write_bytes("id,label\n000,Österreich\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8; save the table as"):
        load_dataset(root, config=BREEDS)


@pytest.mark.parametrize("layout", ["pattern", "csv"])
def test_a_split_file_takes_labels_from_names_or_a_table(tmp_path, layout):
    if layout == "csv":
        root, config = breeds(tmp_path / "d"), BREEDS
        rows = [f"train/{i:03d}.jpg,{i % 3}" for i in range(12)]
    else:
        root, config = pets(tmp_path / "d"), DataConfig(pattern=PETS)
        rows = [f"{kind}_{i}.jpg,{i % 3}" for kind in ("pug", "Abyssinian") for i in range(1, 11)]
    (tmp_path / "s.csv").write_text("\n".join(["path,fold", *rows]))
    chosen = config.model_copy(update={"fold": 1})
    found = load_dataset(root, split=tmp_path / "s.csv", config=chosen)
    plain = load_dataset(root, config=config)
    labels = {s.path: plain.classes[s.label] for s in plain.train + plain.valid}
    for path, label in found.train + found.valid:
        assert labels[path] == found.classes[label]
    held_out = [s.path.relative_to(found.root).as_posix() for s in found.valid]
    assert held_out == [row[:-2] for row in rows if row.endswith(",1")]
    assert len(found.unlabelled) == (2 if layout == "csv" else 0)
    write_split(found, tmp_path / SPLIT_FILE)
    again = read_split(tmp_path / SPLIT_FILE, found.root, found.classes, root)
    assert again.fingerprint == found.fingerprint
    assert (again.train, again.valid) == (found.train, found.valid)


def test_a_split_file_with_unlabelled_photos_is_an_error(tmp_path):
    root = breeds(tmp_path / "d")
    (tmp_path / "s.csv").write_text("path,fold\ntrain/000.jpg,train\ntest/x.jpg,valid\n")
    with pytest.raises(DataError, match=r"line 3: 'test/x\.jpg' has no label"):
        load_dataset(root, split=tmp_path / "s.csv", config=BREEDS)
    (tmp_path / "s.csv").write_text("path,fold\n000.jpg,train\n")
    with pytest.raises(DataError, match="names of parts, not of classes"):
        load_dataset(root, split=tmp_path / "s.csv")
    plain = photos(tmp_path / "plain", *(f"{c}/{i}.jpg" for c in "ab" for i in range(3)))
    with pytest.raises(DataError, match=r"line 2: no photo '000\.jpg'"):
        load_dataset(plain, split=tmp_path / "s.csv")


def test_a_split_file_for_train_and_valid_folders_takes_the_class_from_the_inner_folder(tmp_path):
    root = photos(tmp_path / "d", *(f"{p}/{c}/1.jpg" for p in ("train", "valid") for c in "ab"))
    rows = [
        "train/a/1.jpg,valid",
        "train/b/1.jpg,valid",
        "valid/a/1.jpg,train",
        "valid/b/1.jpg,train",
    ]
    (tmp_path / "s.csv").write_text("\n".join(["path,fold", *rows]))
    found = load_dataset(root, split=tmp_path / "s.csv")
    assert found.classes == ("a", "b")
    assert {s.path.parent.parent.name for s in found.train} == {"valid"}


def test_folds_are_a_partition_and_need_a_dataset_without_a_split(tmp_path):
    root = pets(tmp_path / "d")
    parts = [
        load_dataset(root, config=DataConfig(pattern=PETS, folds=4, fold=i), seed=2)
        for i in range(4)
    ]
    held_out = [s for found in parts for s in found.valid]
    assert sorted(held_out) == sorted(parts[0].train + parts[0].valid)
    assert len(set(held_out)) == len(held_out) == 30
    for found in parts:
        assert not set(found.train) & set(found.valid)
    with pytest.raises(OptionError, match=r"data\.fold = 1 has no effect alone"):
        load_dataset(root, config=DataConfig(pattern=PETS, fold=1))
    (tmp_path / "s.csv").write_text("path,fold\npug_1.jpg,train\n")
    for config, message in (({"folds": 2}, "defines the split"), ({"fold": 2}, "has no numbers")):
        with pytest.raises(OptionError, match=message):
            load_dataset(root, split=tmp_path / "s.csv", config=DataConfig(pattern=PETS, **config))
    parted = photos(tmp_path / "p", *(f"{p}/{c}/1.jpg" for p in ("train", "valid") for c in "ab"))
    with pytest.raises(OptionError, match="is split already"):
        load_dataset(parted, config=DataConfig(folds=2))


def test_an_unlabelled_test_folder_is_neither_a_class_nor_a_part(tmp_path):
    flat = photos(tmp_path / "d", *(f"{c}/{i}.jpg" for c in "ab" for i in range(3)), "test/9.jpg")
    found = load_dataset(flat)
    assert found.classes == ("a", "b")
    assert [p.name for p in found.unlabelled] == ["9.jpg"]
    parts = photos(
        tmp_path / "e", *(f"{p}/{c}/1.jpg" for p in ("train", "val") for c in "ab"), "test/9.jpg"
    )
    found = load_dataset(parts)
    assert found.test == ()
    assert [p.name for p in found.unlabelled] == ["9.jpg"]
    photos(tmp_path / "e", "test/a/1.jpg")
    found = load_dataset(parts)
    assert len(found.test) == 1
    assert found.unlabelled == ()


def test_a_class_only_in_the_valid_part_is_an_error(tmp_path):
    root = photos(tmp_path / "d", *(f"{p}/{c}/1.jpg" for p in ("train", "valid") for c in "ab"))
    photos(tmp_path / "d", "valid/cc/1.jpg")
    with pytest.raises(DataError, match="'cc' has no photo in the train part"):
        load_dataset(root)


def test_with_a_pattern_unlabelled_photos_are_searched_below_images(tmp_path):
    names = [f"images/{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(3)]
    root = photos(tmp_path / "d", *names, "images/test/1.jpg", "test/stray.jpg")
    config = DataConfig(pattern=r"^(cat|dog)\.", images="images")
    assert [p.name for p in load_dataset(root, config=config).unlabelled] == ["1.jpg"]


def test_labels_of_thousands_of_digits_are_in_natural_order(tmp_path):
    labels = ["1" + "0" * 5000, "9" * 4999, "2"]
    rows = [f"{i:03d},{labels[i % 3]}" for i in range(12)]
    found = load_dataset(breeds(tmp_path / "d", rows), config=BREEDS)
    assert found.classes == tuple(reversed(labels))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": ("id", "id"), "csv": "x.csv"}, "columns are both 'id'"),
        ({"suffix": ".jpg", "pattern": "(x)"}, "suffix has no effect with pattern"),
    ],
)
def test_options_without_an_effect_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)
    if "images" in values:
        DataConfig(**values, pattern="(x)")
