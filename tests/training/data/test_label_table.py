"""Tables of labels as people have them: other programs, other systems, other folders."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from serving.errors import DataError, OptionError
from training.config.sections import DataConfig
from training.data import other_labels
from training.data.dataset import Dataset, load_dataset, read_split, write_split

NAMES = [f"{label}/{n}.jpg" for label in ("ants", "bees") for n in range(3)]
PATHS = [f"photos/{name}" for name in NAMES]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def table(path: Path, rows: list[tuple[str, str]], first: str = "id,label", d: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [first, *(f"{name}{d}{label}" for name, label in rows)]
    path.write_text("\n".join(filter(None, lines)) + "\n", "utf-8", "surrogateescape")
    return path


def labels(found: Dataset) -> dict[str, str]:
    photos = [*found.train, *found.valid, *found.test]
    return {p.relative_to(found.root).as_posix(): found.classes[label] for p, label in photos}


def truth(root: str = "photos/") -> dict[str, str]:
    return {f"{root}{name}": name.partition("/")[0] for name in NAMES}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("first", "delimiter"),
    [
        ("id,label", ","),
        ("id, label", ", "),
        ("Bild;class", ";"),
        ("image\tSpecies", "\t"),
        ("", ","),
        ("", ";"),
    ],
)
@pytest.mark.parametrize("as_data", [True, False])
def test_a_table_of_any_program_is_read_as_the_data_set_or_in_its_folder(
    tmp_path: Path, first: str, delimiter: str, end: str, encoding: str, as_data: bool
) -> None:
    touch(tmp_path, *PATHS)
    rows = [(f"photos/{name}", label) for name, label in truth("").items()]
    path = table(tmp_path / "labels.csv", rows, first, delimiter)
    path.write_bytes(path.read_text().replace("\n", end).encode(encoding))
    if as_data:
        found = load_dataset(str(path))
    else:
        found = load_dataset(str(tmp_path), config=DataConfig(csv="labels.csv"))
    assert labels(found) == truth()
    assert found.root == tmp_path


@pytest.mark.parametrize(
    "form",
    [
        "photos/{}",
        "./photos//{}",
        "photos\\{}",
        "{}",  # the folder photos/ is the only one that has them
        "C:\\Users\\me\\data\\photos\\{}",
        "\\\\server\\share\\photos\\{}",
        "/content/drive/MyDrive/photos/{}",
        "other/photos/{}",
        "../photos/{}",
        "PHOTOS/{}",
        "{root}/photos/{}",
    ],
)
@pytest.mark.parametrize(("suffix", "first"), [(True, "Bild,Art"), (False, "id,label")])
def test_names_of_another_system_or_folder_are_found(
    tmp_path: Path, form: str, suffix: bool, first: str
) -> None:
    touch(tmp_path, *PATHS, "photos/ants/readme.txt", "elsewhere/birds/9.jpg")
    rows = []
    for name, label in truth("").items():
        name = name.replace("/", "\\") if "\\" in form else name
        given = form.replace("{root}", str(tmp_path)).replace("{}", name)
        rows.append((given if suffix else given.removesuffix(".jpg"), label))
    found = load_dataset(str(table(tmp_path / "labels.csv", rows, first)))
    assert labels(found) == truth()


def test_a_first_row_without_a_suffix_is_not_lost(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS)
    rows = [(f"photos/{name.removesuffix('.jpg')}", label) for name, label in truth("").items()]
    assert labels(load_dataset(str(table(tmp_path / "labels.csv", rows, "")))) == truth()


def test_names_in_another_unicode_form_and_case_are_found(tmp_path: Path) -> None:
    touch(tmp_path, *(unicodedata.normalize("NFD", f"é/{n}.JPG") for n in range(4)))
    rows = [(unicodedata.normalize("NFC", f"É/{n}.jpg"), "ab"[n % 2]) for n in range(4)]
    assert len(labels(load_dataset(str(table(tmp_path / "t.csv", rows))))) == 4


def test_a_table_may_lie_in_another_folder_than_its_photos(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS)
    rows = [(f"../photos/{name}", label) for name, label in truth("").items()]
    path = table(tmp_path / "tables" / "t.csv", rows)
    found = load_dataset(str(path))
    assert (found.root, labels(found)) == (tmp_path, truth())
    write_split(found, tmp_path / "split.csv")
    again = read_split(tmp_path / "split.csv", found.root, found.classes, str(path))
    assert again.fingerprint == found.fingerprint
    inside = load_dataset(str(tmp_path), config=DataConfig(csv="tables/t.csv"))
    assert labels(inside) == truth()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    rows = [(f"{tmp_path}/link/{name}", label) for name, label in truth("").items()]
    assert labels(load_dataset(str(table(path, rows)))) == truth("link/")


def test_photos_outside_of_the_data_folder_are_refused_for_data_csv(tmp_path: Path) -> None:
    touch(tmp_path / "a", "x/1.jpg", "x/2.jpg")
    touch(tmp_path / "b", "3.jpg", "4.jpg")
    rows = [("x/1.jpg", "a"), ("x/2.jpg", "a"), (f"{tmp_path}/b/3.jpg", "b"), ("../b/4.jpg", "b")]
    table(tmp_path / "a" / "t.csv", rows)
    with pytest.raises(DataError) as refused:
        load_dataset(str(tmp_path / "a"), config=DataConfig(csv="t.csv"))
    first, second = str(refused.value).split("\n")[1:]  # long paths are cut in the middle
    assert re.fullmatch(r"  line 4: '.*/b/3\.jpg' lies outside of the data folder .*/a", first)
    assert second == f"  line 5: '../b/4.jpg' lies outside of the data folder {tmp_path}/a"
    assert load_dataset(str(tmp_path / "a" / "t.csv")).root == tmp_path


def test_a_photo_that_is_missing_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS, "old/ants/9.jpg", "test/ants/8.jpg")
    rows = [*((f"photos/{n}", c) for n, c in truth("").items()), ("photos/ants/9.jpg", "ants")]
    with pytest.raises(
        DataError, match=r"8: no photo 'photos/ants/9.jpg' \(there is 'old/ants/9.j"
    ):
        load_dataset(str(table(tmp_path / "t.csv", rows)))
    rows = [*((f"C:\\photos\\{n}", c) for n, c in truth("").items()), ("C:\\photos\\8.jpg", "x")]
    with pytest.raises(DataError, match=r"line 8: no photo 'C:.*8\.jpg'"):
        load_dataset(str(table(tmp_path / "t.csv", rows)))


def test_names_without_folders_may_be_spread_over_folders(tmp_path: Path) -> None:
    touch(tmp_path, *(f"part_{n % 2}/{n}.jpg" for n in range(6)), "test/9.jpg")
    rows = [(f"{n}", "ab"[n % 2]) for n in range(6)]
    path = table(tmp_path / "t.csv", rows)
    assert labels(load_dataset(str(path))) == {
        f"part_{n % 2}/{n}.jpg": "ab"[n % 2] for n in range(6)
    }
    with pytest.raises(DataError, match=r"line 8: no photo '9' \(there is 'test/9\.jpg'\)"):
        load_dataset(str(table(path, [*rows, ("9", "a")])))
    touch(tmp_path, "part_1/0.jpg")
    with pytest.raises(DataError, match=r"mistakes"):
        load_dataset(str(table(path, rows)))


def test_a_name_without_suffix_that_two_photos_have_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "1.png", "2.jpg", "3.jpg")
    rows = [("1", "a"), ("2", "a"), ("3", "b")]
    with pytest.raises(DataError, match=r"line 2: '1' is '1.jpg' or '1.png'; write the name with"):
        load_dataset(str(table(tmp_path / "t.csv", rows)))


def test_all_mistakes_are_told_together_with_their_lines(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS)
    rows = [("photos/ants/0.jpg", "ants")]
    rows += [("", "ants"), ("photos/ants/1.jpg", ""), ("photos/ants/0.jpg", "bees")]
    rows += [("photos/bees/0.jpg", "bees,more"), ("photos/bees/1.jpg", os.fsdecode(b"\xe9"))]
    rows += [(f"gone/{n}.jpg", "ants") for n in range(30)]
    with pytest.raises(DataError) as refused:
        load_dataset(str(table(tmp_path / "t.csv", rows)))
    first, *lines = str(refused.value).split("\n  ")
    assert first == f"{tmp_path}/t.csv has 35 mistakes:"
    assert lines[:5] == [
        "line 3: id '' names no photo",
        "line 4: 'photos/ants/1.jpg' has no label",
        "line 5: 'photos/ants/0.jpg' is in line 2, too",
        "line 6: 3 fields, and the first line has 2 columns; quote what has a delimiter",
        r"line 7: label '\udce9' is not UTF-8; save the table as 'CSV UTF-8'",
    ]
    assert lines[5:] == [
        *(f"line {n + 8}: no photo 'gone/{n}.jpg'" for n in range(15)),
        "and 15 more",
        f"30 of 36 rows have none below {tmp_path}; see data.images and data.suffix",
    ]


def test_the_told_option_for_columns_works_when_pasted(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS)
    rows = [(f"photos/{name},x", f"{label},y") for name, label in truth("").items()]
    path = table(tmp_path / "t.csv", rows, "the file,genus,it's,z")
    with pytest.raises(DataError, match="no column of labels among 'the file', 'genus'") as refused:
        load_dataset(str(path))
    (word,) = shlex.split(str(refused.value).partition("labels: ")[2])
    option = tomllib.loads(word.replace("data.", ""))
    assert option == {"columns": ["the file", "it's"]}
    assert labels(load_dataset(str(path), config=DataConfig(**option))) == truth()
    for idle in ({"columns": ("a", "b")}, {"suffix": ".jpg"}, {"images": "photos"}):
        with pytest.raises(OptionError, match="has no effect without a table of labels: name it w"):
            load_dataset(str(tmp_path / "photos"), config=DataConfig(**idle))


def test_a_column_of_parts_is_used(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS)
    parts = ["train", "VAL", "Test"] * 2
    rows = [
        (f"photos/{name}", f"{label},{part}")
        for (name, label), part in zip(truth("").items(), parts, strict=True)
    ]
    found = load_dataset(str(table(tmp_path / "t.csv", rows, "id,label,data set")))
    assert [len(found.train), len(found.valid), len(found.test)] == [2, 2, 2]
    rows = [(name, label.replace("VAL", "train")) for name, label in rows]
    found = load_dataset(str(table(tmp_path / "t.csv", rows, "id,label,data set")))
    assert [len(found.train), len(found.valid), len(found.test)] == [2, 2, 2]
    assert {path.name for path, _ in found.test} == {"2.jpg"}
    rows = [(name, label.replace("train", "x")) for name, label in rows]
    found = load_dataset(str(table(tmp_path / "t.csv", rows, "id,label,data set")))
    assert [len(found.train), len(found.valid), len(found.test)] == [4, 2, 0]


def test_json_lines_and_parquet_are_tables_of_labels(tmp_path: Path) -> None:
    touch(tmp_path, *PATHS)
    rows = [(f"photos/{name}", label) for name, label in truth("").items()]
    lines = [f'{{"file_name": "{name}", "label": "{label}"}}\n' for name, label in rows]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    assert labels(load_dataset(str(tmp_path / "t.jsonl"))) == truth()
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"id": [name for name, _ in rows], "label": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    found = load_dataset(str(tmp_path / "t.parquet"))
    assert found.classes == ("0", "1")


@pytest.mark.parametrize(
    ("name", "data", "config", "kind", "message"),
    [
        ("t.xlsx", b"PK\x03\x04", {}, DataError, r"t\.xlsx: it is a spreadsheet or zip archive; s"),
        (
            "t.bin",
            b"x",
            {},
            DataError,
            r"t\.bin: neither a folder nor a table \(\.csv, .*of labels",
        ),
        ("t.csv", b"", {}, DataError, r"t\.csv is empty; write lines of id,label"),
        ("t.csv", b"id,label\n", {}, DataError, r"t\.csv has no row under its first line"),
        ("t.csv", b"x", {"csv": "u.csv"}, OptionError, "is a table of labels, and data.csv = 'u.c"),
        ("t.csv", b"x", {"pattern": "(x)"}, OptionError, "leave out data.pattern, or give the fo"),
    ],
)
def test_a_file_that_is_no_table_of_labels_is_refused(
    tmp_path: Path, name: str, data: bytes, config: dict[str, str], kind: Any, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(kind, match=message) as refused:
        load_dataset(str(tmp_path / name), config=DataConfig(**config))
    assert "\n" not in str(refused.value)


# ---- labels that look alike


NFC, NFD = "caf\xe9", "cafe\u0301"


@pytest.mark.parametrize("layout", ["folders", "table", "parts"])
def test_labels_in_another_unicode_form_or_with_spaces_are_one_class(
    tmp_path: Path, layout: str
) -> None:
    names = [NFC, NFD, f"{NFC} ", "tea"]
    if layout == "table":
        rows = [(f"{i}.jpg", names[i % 4]) for i in range(8)]
        touch(tmp_path, *(name for name, _ in rows))
        found = load_dataset(str(table(tmp_path / "t.csv", rows)))
    else:
        parts = ("train/", "valid/") if layout == "parts" else ("",)
        for n, part in enumerate(parts):
            touch(tmp_path, *(f"{part}{name}/{n}{i}.jpg" for name in names for i in range(2)))
        found = load_dataset(str(tmp_path))
    assert found.classes == (NFC, "tea")
    assert Counter(labels(found).values())[NFC] == 3 * Counter(labels(found).values())["tea"]


def test_a_class_in_another_unicode_form_in_the_validation_part_is_the_same(tmp_path: Path) -> None:
    touch(tmp_path, f"train/{NFC}/1.jpg", f"valid/{NFD}/2.jpg", "train/b/3.jpg", "valid/b/4.jpg")
    found = load_dataset(str(tmp_path))
    assert (found.classes, len(found.valid)) == (("b", NFC), 2)


@pytest.mark.parametrize(
    ("one", "other"), [("Cat", "cat"), ("0", "0.0"), ("7", "007"), ("a  b", "a b")]
)
def test_labels_that_look_alike_are_refused_merged_or_kept(
    tmp_path: Path, one: str, other: str
) -> None:
    rows = [("1.jpg", one), ("2.jpg", one), ("3.jpg", one), ("4.jpg", other), ("5.jpg", other)]
    rows += [("6.jpg", "dog"), ("7.jpg", "dog")]
    touch(tmp_path, *(name for name, _ in rows))
    path = str(table(tmp_path / "t.csv", rows))
    with pytest.raises(DataError) as refused:
        load_dataset(path)
    assert str(refused.value) == (
        f"{tmp_path}, classes that look alike: {one!r} (3 photos) and {other!r} (2 photos); add "
        "data.similar=merge to make them one class, or data.similar=keep to keep them"
    )
    merged = load_dataset(path, config=DataConfig(similar="merge"))
    assert Counter(labels(merged).values()) == {one: 5, "dog": 2}
    kept = load_dataset(path, config=DataConfig(similar="keep"))
    assert Counter(labels(kept).values()) == {one: 3, other: 2, "dog": 2}


def test_letters_in_both_cases_are_classes_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{letter}/{n}.jpg" for letter in "aAbB" for n in range(2)))
    assert load_dataset(str(tmp_path)).classes == ("A", "B", "a", "b")


def test_a_class_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/2.jpg", os.fsdecode(b"b\xff/1.jpg"), os.fsdecode(b"b\xff/2.jpg"))
    with pytest.raises(DataError, match=r"class 'b\\udcff' is not a UTF-8 name; rename it"):
        load_dataset(str(tmp_path))


def test_tables_of_labels_and_splits_have_a_largest_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *NAMES)
    names = [(name, name.partition("/")[0]) for name in NAMES]
    table(tmp_path / "labels.csv", names)
    split = table(tmp_path / "split.csv", [(name, "0") for name in NAMES], "path,fold")
    monkeypatch.setattr("serving.tables.reader.MAX_ROWS", len(NAMES) - 1)
    with pytest.raises(DataError, match=r"labels\.csv: more than 5 rows"):
        load_dataset(str(tmp_path / "labels.csv"))
    with pytest.raises(DataError, match=r"split\.csv: more than 5 rows"):
        load_dataset(str(tmp_path), split=split)


def test_of_a_table_beside_folders_of_classes_the_first_rows_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_labels, "_MAX_ROWS", 3)
    touch(tmp_path, *NAMES)
    photos = {tmp_path / name: name.partition("/")[0] for name in NAMES}
    table(tmp_path / "a.csv", [(name, "cat" if n >= 3 else "ants") for n, name in enumerate(NAMES)])
    other_labels.check_tables(tmp_path, photos)
    table(tmp_path / "a.csv", [(name, "cat" if n % 2 else "dog") for n, name in enumerate(NAMES)])
    with pytest.raises(DataError, match=r"a\.csv gives the photos other labels"):
        other_labels.check_tables(tmp_path, photos)
