"""Sets as people have them are read as they are meant, or refused with a remedy that works."""

import shlex
from pathlib import Path

import pytest

from serving.errors import DataError
from tests.training.data.test_structure import make, pasted, read, refused
from training.config.sections import DataConfig
from training.data.dataset import load_dataset

PATTERN = r"^(.*?[^\W\d_].*?)[ ._(-]*[0-9]+\)?\."


def write_table(root: Path, head: str, names: dict[str, str], encoding: str = "utf-8") -> None:
    """Write Tabelle.csv, as a spreadsheet of a country with decimal commas exports it."""
    rows = [f"{name};{label}" for name, label in names.items()]
    (root / "Tabelle.csv").write_text("\r\n".join([head, *rows, ""]), encoding=encoding)


@pytest.mark.parametrize(
    ("head", "written", "encoding"),
    [
        ("Dateiname;Klasse", "Fotos\\{}.jpg", "utf-16"),
        ("Dateiname;Klasse", "C:\\Users\\me\\Fotos\\{}.JPG", "utf-8-sig"),
        ("Wo;Was", "{}.jpg", "utf-8"),
        ("Nummer;Sorte", "{}", "utf-16"),
    ],
)
def test_a_table_that_names_the_photos_goes_before_their_file_names(
    tmp_path, head, written, encoding
):
    make(tmp_path, "Fotos/Anna {8}.jpg", "Fotos/Ben {8}.jpg")
    names = {f"{name} {i}": "ab"[i % 2] for name in ("Anna", "Ben") for i in range(8)}
    write_table(tmp_path, head, {written.format(k): v for k, v in names.items()}, encoding)
    message = refused(tmp_path)
    assert "Tabelle.csv has a row for each photo (labels a 8, b 8): add data.csv=" in message
    assert "; or the file names in Fotos/ begin with labels (Anna 8, Ben 8): add" in message
    found = load_dataset(str(tmp_path), config=pasted(message))
    assert found.classes == ("a", "b")
    assert {int(one.path.stem.split()[1]) % 2 for one in found.train if one.label == 0} == {0}


def test_a_table_that_lacks_photos_or_has_wrong_rows_is_told_with_its_counts(tmp_path):
    make(tmp_path, "Fotos/IMG_{10}.jpg")
    names = {f"IMG_{i}.jpg": "ab"[i % 2] for i in range(8)} | {"gone.jpg": "a"}
    write_table(tmp_path, "Datei;Klasse", names)
    assert "Tabelle.csv has rows for 8 of 10 photos" in refused(tmp_path)


def test_a_table_without_labels_or_of_other_photos_is_not_proposed(tmp_path):
    make(tmp_path, "Fotos/Anna {8}.jpg", "Fotos/Ben {8}.jpg")
    write_table(tmp_path, "Datei;Klasse", {f"other {i}.jpg": "ab"[i % 2] for i in range(8)})
    assert "Tabelle.csv" not in refused(tmp_path)
    names = [f"{name} {i}.jpg" for name in ("Anna", "Ben") for i in range(8)]
    write_table(tmp_path, "Datei;Nummer", {name: str(i) for i, name in enumerate(names)})
    assert "Tabelle.csv" not in refused(tmp_path)
    write_table(tmp_path, "id;label", dict.fromkeys(names, "0"))  # a submission to fill in
    assert "Tabelle.csv" not in refused(tmp_path)


def test_a_table_that_contradicts_the_given_pattern_is_told(tmp_path):
    make(tmp_path, "Fotos/Anna {8}.jpg", "Fotos/Ben {8}.jpg")
    names = [f"{name} {i}" for name in ("Anna", "Ben") for i in range(8)]
    write_table(tmp_path, "Datei;Klasse", {f"Fotos\\{n}.jpg": "ab"[int(n[-1]) % 2] for n in names})
    found = read(tmp_path, pattern=PATTERN)
    assert found.classes == ("Anna", "Ben")
    warning = list(found.reading.lines())[-1]
    assert warning.startswith("warning: Tabelle.csv gives the photos other labels ('a', 'b')")
    word = shlex.split(warning.partition(", give ")[2].partition(" instead")[0])[0]
    key, _, value = word.partition("=")
    config = DataConfig(**{key.removeprefix("data."): value})
    assert load_dataset(str(tmp_path), config=config).classes == ("a", "b")
    write_table(tmp_path, "Datei;Klasse", {f"Fotos\\{n}.jpg": n.split()[0] for n in names})
    assert not read(tmp_path, pattern=PATTERN).reading.warning


def test_years_over_classes_are_refused_and_read_by_the_told_option(tmp_path):
    classes = {"2022": "abc", "2023": "abcd", "2024": "abd"}  # not each is there each year
    make(tmp_path, *(f"{year}/{name}/{{3}}.jpg" for year in classes for name in classes[year]))
    make(tmp_path, "2022/stray.jpg")
    config = pasted(refused(tmp_path).replace(", add ", ": add ", 1).replace(", or give", "; "))
    assert config.layout == "inner"
    found = load_dataset(str(tmp_path), config=config)
    assert found.classes == ("a", "b", "c", "d")
    assert len(found.train) + len(found.valid) == 30
    assert found.reading.passed_over.totals() == {"outside-classes": 1}


def test_years_below_parts_and_months_below_years_are_read_to_the_innermost_classes(tmp_path):
    folders = [f"{y}/{m}/{c}" for y in ("2023", "2024") for m in ("05", "06") for c in "ab"]
    make(tmp_path, *(f"train/{one}/{{2}}.jpg" for one in folders))
    make(tmp_path, *(f"test/{one}/0.jpg" for one in folders))
    assert "add data.layout=inner" in refused(tmp_path)
    found = read(tmp_path, layout="inner")
    assert found.classes == ("a", "b")
    assert len(found.test) == 8
    assert all(one.path.relative_to(tmp_path).parts[0] == "test" for one in found.test)


@pytest.mark.parametrize(
    "folders",
    [
        ["cat/images", "dog/images"],
        ["cat/a", "cat/b", "dog/c", "dog/d"],
        ["cat/a", "cat/b", "dog"],
    ],
)
def test_classes_with_other_folders_in_them_are_classes(tmp_path, folders):
    make(tmp_path, *(f"{folder}/{{4}}.jpg" for folder in folders))
    assert read(tmp_path).classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"data\.layout=inner reads; leave the option out"):
        read(tmp_path, layout="inner")


@pytest.mark.parametrize("other", ["train/cat.{4}.jpg", "pictures/{4}.jpg"])
def test_a_folder_of_several_sets_is_refused_and_the_told_one_is_read(tmp_path, other):
    make(tmp_path, "dog breeds/train/{6}.jpg", "dog breeds/test/{8}.jpg", f"pets/{other}")
    make(tmp_path, "pets/test1/{4}.jpg")
    rows = "".join(f"{i},{'ab'[i % 2]}\n" for i in range(6))
    (tmp_path / "dog breeds/labels.csv").write_text("id,breed\n" + rows)
    message = refused(tmp_path)
    assert "these look like sets of their own, as dog breeds/labels.csv gives" in message
    one = shlex.split(message.partition("--data ")[2])[0].rstrip(",")
    with pytest.raises(DataError, match=r"labels\.csv has a row for each photo") as caught:
        load_dataset(one)
    assert load_dataset(one, config=pasted(caught.value.args[0])).classes == ("a", "b")
    assert read(tmp_path, layout="classes").classes == ("dog breeds", "pets")


def test_a_table_in_a_class_folder_that_does_not_contradict_it_is_passed_by(tmp_path):
    make(tmp_path, "cat/{4}.jpg", "dog/{4}.jpg")
    for name in ("cat", "dog"):
        rows = "".join(f"{i}.jpg,{name},{i}\n" for i in range(4))
        (tmp_path / name / "labels.csv").write_text("file,label,shot\n" + rows)
    assert read(tmp_path).classes == ("cat", "dog")


def test_parts_in_folders_whose_photos_are_named_by_labels_are_told(tmp_path):
    make(tmp_path, "pets/train/cat.{4}.jpg", "pets/train/dog.{4}.jpg", "pets/test/{4}.jpg")
    make(tmp_path, "fruit/train/{4}.jpg", "fruit/test/{4}.jpg")
    found = read(tmp_path)
    assert found.classes == ("fruit", "pets")  # as before: they may be classes
    assert "the file names in pets/ begin with labels (cat 4, dog 4)" in found.reading.warning


def test_a_table_in_another_encoding_is_told_in_one_line(tmp_path):
    make(tmp_path, "{30}.jpg")
    write_table(tmp_path, "Datei;Klasse", {f"{i}.jpg": "K\xe4fer" for i in range(30)}, "cp1252")
    assert refused(tmp_path, csv="Tabelle.csv") == (
        f"{tmp_path}/Tabelle.csv, line 2: label 'K\\udce4fer' is not UTF-8; save the table as "
        "'CSV UTF-8' (and 29 more labels that are not UTF-8)"
    )


def test_a_submission_is_told_to_be_no_table_of_labels(tmp_path):
    make(tmp_path, "test/{3}.jpg")
    table = tmp_path / "sample_submission.csv"
    table.write_text("id,beagle,boxer\n")
    with pytest.raises(DataError, match=r"sample_submission\.csv has no row under its first line"):
        load_dataset(str(table))
    table.write_text("id,beagle,boxer\n" + "".join(f"{i},0.0083,0.5\n" for i in range(3)))
    with pytest.raises(DataError, match="numbers such as probabilities: give the table of labels"):
        load_dataset(str(table))


def test_numbered_folders_in_each_class_are_no_classes_and_told(tmp_path):
    make(tmp_path, *(f"{name}/video_0{i}/{{3}}.jpg" for name in ("ash", "oak") for i in range(4)))
    found = read(tmp_path)
    assert found.classes == ("ash", "oak")
    assert "each class folder has the same folders in it ('video_00/'" in found.reading.warning
    assert "add data.layout=inner" in found.reading.warning
    assert len(read(tmp_path, layout="inner").classes) == 4
