"""True labels: by the folder that training takes, or from a table that any program wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import DataError
from serving.evaluation.evaluate_scores import EvaluationOptions, evaluate
from tests.support.hypothesis_profiles import examples
from training.data.dataset import load_dataset

NFC, NFD = "caf\xe9", "cafe\u0301"


def scores(path: Path, rows: dict[str, str], classes: list[str] | None = None) -> Path:
    lines = [
        json.dumps({"path": p, "status": "ok", "label": label, "probability": 0.5})
        for p, label in rows.items()
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    if classes is not None:
        summary = {"classes": classes}
        path.with_name(f"{path.stem}.summary.json").write_text(json.dumps(summary))
    return path


def run(path: Path, **options: Any) -> dict[str, Any]:
    lines: list[str] = []
    options = options or {"labels_from_folders": True}
    found = evaluate(path, EvaluationOptions(**options), log=lines.append)
    return found | {"lines": lines}


def truths(path: Path, **options: Any) -> list[str]:
    return sorted(item["label"] for item in run(path, **options)["classes"])


@pytest.mark.parametrize("classes", [["ants", "bees"], None])
def test_the_label_is_the_folder_that_training_takes(tmp_path: Path, classes: Any) -> None:
    names = ["bees/day1/1.jpg", "bees/day2/ants/2.jpg", "ants/day1/3.jpg", "ants/4.jpg"]
    for root in ("", "photos/", "photos/valid/", "/mnt/bees/photos/", "in.zip::", "C:/x/photos/"):
        rows = {f"{root}{name}": name.partition("/")[0] for name in names}
        found = run(scores(tmp_path / "s.jsonl", rows, classes))
        assert found["accuracy"]["value"] == 1, root
        assert found["unknown_labels"] == {}


def test_one_class_alone_and_classes_in_several_parts(tmp_path: Path) -> None:
    rows = {f"/home/ants/photos/bees/day{n}/1.jpg": "bees" for n in range(3)}
    assert truths(scores(tmp_path / "s.jsonl", rows, ["ants", "bees"])) == ["bees"]
    rows = {f"photos/{p}/{c}/d/1.jpg": c for p in ("train", "valid") for c in ("ants", "bees")}
    assert truths(scores(tmp_path / "s.jsonl", rows, ["ants", "bees"])) == ["ants", "bees"]


def test_an_unknown_class_is_that_of_the_same_level(tmp_path: Path) -> None:
    rows = {f"photos/{label}/day{n}/1.jpg": "ants" for label in ("ants", "wolf") for n in (1, 2)}
    found = run(scores(tmp_path / "s.jsonl", rows, ["ants", "bees"]))
    assert found["unknown_labels"] == {"wolf": 2}


def test_no_known_label_at_all_ends_with_the_nearest_labels(tmp_path: Path) -> None:
    path = scores(tmp_path / "s.jsonl", {"in/bee/1.jpg": "bees", "in/wolf/2.jpg": "ants"}, ["bees"])
    path = scores(path, {"in/bee/1.jpg": "bees", "in/bee/2.jpg": "ants"}, ["ants", "bees", "wasps"])
    with pytest.raises(DataError) as refused:
        run(path)
    assert str(refused.value) == (
        f"{path}: no true label is a class of the model: bee 2; the nearest to 'bee': 'bees'"
    )
    path = scores(path, {"3/1.jpg": "bees", "0/2.jpg": "ants"}, ["ants", "bees", "wasps"])
    with pytest.raises(DataError, match=r"3 1, 0 1; the labels are 'ants', 'bees', 'wasps'; if "):
        run(path)
    path.with_name("s.summary.json").unlink()
    with pytest.raises(DataError, match=r"among the answers: .*; if these are classes, add --bund"):
        run(path)


def test_a_command_without_a_known_label_ends_with_2(tmp_path: Path) -> None:
    path = scores(tmp_path / "s.jsonl", {"in/day1/1.jpg": "bees"}, ["ants", "bees"])
    words = [sys.executable, "-m", "fledge", "evaluate-scores", str(path), "--labels-from-folders"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"fledge: {path}: no true label is a class of the model: day1 1; the labels are 'ants', "
        "'bees'; if the folders are no classes, give a table of path and label, such as the "
        "split.csv of the run, with --labels TABLE instead of --labels-from-folders\n"
    )


@pytest.mark.parametrize("known", [True, False])
def test_labels_are_the_same_in_another_form_and_told_if_they_only_look_alike(
    tmp_path: Path, known: bool
) -> None:
    classes = [NFD, "Dog", "7"]
    rows = {"1.jpg": NFD, "2.jpg": "Dog", "3.jpg": "7", "4.jpg": "Dog"}
    path = scores(tmp_path / "s.jsonl", rows, classes if known else None)
    labels = tmp_path / "l.csv"
    labels.write_text(f"file;class\n1.jpg; {NFC} \n2.jpg;DOG\n3.jpg;007\n4.jpg;Dog\n")
    found = run(path, labels=labels)
    assert found["accuracy"]["value"] == 1
    assert found["respelled"] == {"DOG": "Dog", "007": "7"}
    text = "\n".join(found["lines"])
    assert "'DOG' is taken for 'Dog'" in text
    assert "'007' is taken for '7'" in text
    assert "is taken for 'caf" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        "path,label\n{0},ants\n{1},bees\n",
        "label;image\r\nants;{0}\r\nbees;{1}\r\n",
        "id, label\n{0}, ants\n{1}, bees\n",
        "{0}\tants\n{1}\tbees\n",
        '{{"file_name": "{0}", "category": "ants"}}\n{{"file_name": "{1}", "category": "bees"}}\n',
    ],
)
@pytest.mark.parametrize(
    "names",
    [
        ("in/a/1.jpg", "in/b/1.jpg"),
        ("a/1.jpg", "b/1.jpg"),
        ("C:/data/a/1.jpg", "C:/data/b/1.jpg"),
        ("./in//a/1.jpg", "./in//b/1.jpg"),
        ("a/1", "b/1"),
    ],
)
def test_a_table_of_labels_of_any_program_is_matched(
    tmp_path: Path, names: tuple[str, str], text: str, encoding: str
) -> None:
    if text.startswith("{0}") and "." not in names[0]:
        text = f"path\tlabel\n{text}"  # without a suffix, a first row looks like names of columns
    rows = {"in/a/1.jpg": "ants", "in/b/1.jpg": "bees"}
    path = scores(tmp_path / "s.jsonl", rows, ["ants", "bees"])
    labels = tmp_path / ("l.jsonl" if text.startswith("{{") else "l.csv")
    labels.write_bytes(text.format(*names).encode(encoding))
    assert run(path, labels=labels)["accuracy"]["right"] == 2
    if "." in names[0] and not labels.name.endswith("jsonl"):
        labels.write_bytes(text.format(*(n.replace("/", "\\") for n in names)).encode(encoding))
        assert run(path, labels=labels)["accuracy"]["right"] == 2


def test_ends_of_paths_that_several_images_have_are_ambiguous(tmp_path: Path) -> None:
    rows = {"x/a/1.jpg": "ants", "y/a/1.jpg": "ants", "x/b/2.jpg": "ants"}
    path = scores(tmp_path / "s.jsonl", rows, ["ants"])
    (tmp_path / "l.csv").write_text("path,label\na/1.jpg,ants\nb/2.jpg,ants\nc/2.jpg,ants\n")
    found = run(path, labels=tmp_path / "l.csv")
    assert (found["evaluated"], found["ambiguous_file_name"]) == (1, 2)


def test_all_mistakes_of_a_table_of_labels_are_told_together(tmp_path: Path) -> None:
    path = scores(tmp_path / "s.jsonl", {"1.jpg": "ants"}, ["ants"])
    labels = tmp_path / "l.csv"
    text = f"path,label\n1.jpg,{NFC}\n1.jpg,ants\n2.jpg\n3.jpg,a,b\n4.jpg,".encode()
    labels.write_bytes(text + b"\xe9\n1.jpg," + NFD.encode() + b"\n")
    with pytest.raises(DataError) as refused:
        run(path, labels=labels)
    assert str(refused.value).split("\n  ") == [
        f"--labels {labels} has 4 mistakes:",
        r"line 3: '1.jpg' is 'caf\xe9' in line 2 and 'ants' in line 3; keep one",
        "line 4: 1 field, and the first line has 2; is the file whole?",
        "line 5: 3 fields, and the first line has 2 columns; quote what has a delimiter",
        r"line 6: label '\udce9' is not UTF-8; save the table as 'CSV UTF-8'",
    ]


def test_a_table_of_scores_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    text = "path;status;label;probability\r\nants/1.jpg;ok;ants;0.5\r\nants/2.jpg;ok;ants;0.75\r\n"
    (tmp_path / "s.csv").write_bytes(text.encode("utf-16"))
    assert run(tmp_path / "s.csv")["accuracy"]["right"] == 2


FOLDERS = st.sampled_from(
    ["ants", "bees", "day1", "x y", "ants2", unicodedata.normalize("NFD", "ü")]
)


@given(
    st.sets(st.tuples(st.sampled_from(["ants", "bees"]), st.lists(FOLDERS, max_size=2).map(tuple))),
    st.sampled_from(["", "photos", "ants/bees"]),
    st.booleans(),
)
@examples(15)
def test_training_and_evaluation_take_the_same_label(places: Any, root: str, parts: bool) -> None:
    places |= {("ants", ()), ("bees", ())}  # training needs photos right below the class or deeper
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, root)
        for part in ("train", "valid") if parts else ("",):
            for label, inner in places:
                for name in ("1.jpg", "2.jpg"):
                    path = data.joinpath(part, label, *inner, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
        found = load_dataset(str(data))
        photos = [*found.train, *found.valid]
        truth = {os.path.relpath(p, folder): found.classes[label] for p, label in photos}
        path = scores(Path(folder, "s.jsonl"), truth, list(found.classes))
        figures = run(path)
        assert figures["evaluated"] == figures["accuracy"]["right"] == len(photos)


def test_labels_found_by_folder_and_name_are_told_apart_from_those_by_the_name_alone(
    tmp_path: Path,
) -> None:
    path = scores(tmp_path / "s.jsonl", {"/d/Fotos/1.jpg": "ants", "/d/Fotos/2.jpg": "bees"})
    (tmp_path / "l.csv").write_text("Datei;Klasse\nFotos\\1.jpg;ants\n2.jpg;bees\n")
    found = run(path, labels=tmp_path / "l.csv")
    assert (found["by_path_end"], found["by_file_name"]) == (1, 1)
    text = "\n".join(found["lines"])
    assert "1 row found by the name of the file alone" in text
    assert "1 row found by the end of the path: its folders and the name of the file" in text


def test_folders_that_are_no_classes_are_told_with_the_option_of_a_table(tmp_path: Path) -> None:
    rows = {f"Fotos/{name} {i}.jpg": name for name in ("ants", "bees") for i in range(3)}
    path = scores(tmp_path / "s.jsonl", rows, ["ants", "bees"])
    with pytest.raises(DataError, match=r"split\.csv of the run, with --labels TABLE instead of"):
        run(path)
    split = tmp_path / "split.csv"
    split.write_text("path,fold,label\n" + "".join(f"{p},valid,{n}\n" for p, n in rows.items()))
    assert run(path, labels=split)["accuracy"]["value"] == 1


def test_labels_in_another_encoding_are_told_in_one_line(tmp_path: Path) -> None:
    path = scores(tmp_path / "s.jsonl", {f"{i}.jpg": "ants" for i in range(30)}, ["ants"])
    rows = "".join(f"{i}.jpg,K\xe4fer\n" for i in range(30))
    (tmp_path / "l.csv").write_text("path,label\n" + rows, "cp1252")
    with pytest.raises(DataError) as refused:
        run(path, labels=tmp_path / "l.csv")
    assert str(refused.value) == (
        f"--labels {tmp_path}/l.csv, line 2: label 'K\\udce4fer' is not UTF-8; save the table as "
        "'CSV UTF-8' (and 29 more labels that are not UTF-8)"
    )


def test_a_table_of_labels_without_rows_is_told_before_its_columns(tmp_path: Path) -> None:
    path = scores(tmp_path / "s.jsonl", {"1.jpg": "ants"}, ["ants"])
    (tmp_path / "l.csv").write_text("id,beagle,boxer\n")
    with pytest.raises(DataError, match="no labels in it; write lines of path,label"):
        run(path, labels=tmp_path / "l.csv")


def test_rows_without_a_label_are_told_as_such(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,species\n1.png,\n")
    path = scores(tmp_path / "s.jsonl", {"1.png": "cat"})
    with pytest.raises(
        DataError, match=r"the row of '1\.png' has no label in the column 'species'"
    ):
        run(path, labels=table, labels_column="species")


def test_a_table_of_labels_has_a_largest_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.tables.reader.MAX_ROWS", 1)
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n1.png,cat\n2.png,cat\n")
    with pytest.raises(DataError, match=r"labels\.csv: more than 1 rows"):
        run(scores(tmp_path / "s.jsonl", {"1.png": "cat"}), labels=table)
