"""Sets as people have them are read as they are meant, or refused with a remedy that works."""

import shlex
from pathlib import Path

import pytest

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
