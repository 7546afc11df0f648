"""Names and labels that a spreadsheet would take for formulas."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given

import fledge
from serving.evaluation import table_reader
from serving.scoring.row_writers import csv_line, escape_formula, unescape_formula
from serving.scoring.rows import COLUMNS, ScoreRow
from serving.scoring.table import TableFile
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts
from tests.support.tiny_bundle import photo, tiny_bundle

FORMULAS = ["=1+1.jpg", "+1.jpg", "-1.jpg", "@SUM(A1).jpg", "\t=1.jpg", "\r=1.jpg", "'=1.jpg"]
PLAIN = ["a=1.jpg", "'a.jpg", "1.jpg", " =1.jpg"]
STARTS = ("=", "+", "-", "@", "\t", "\r")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for each label, in the current folder; the names begin as formulas do."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate([*FORMULAS, *PLAIN]):
        Path(name).write_bytes(photo(number))
    Path("=broken.jpg").write_bytes(photo(1)[:500])
    Path("list.csv").write_text(
        "".join(csv_line([name]) for name in ["path", *FORMULAS, *PLAIN, "=broken.jpg"])
    )
    return tmp_path


def score(bundle: Path, *words: str) -> int:
    return fledge.main(["score", "list.csv", "--bundle", str(bundle), "--device", "cpu", *words])


def test_no_cell_of_a_safe_table_is_a_formula_and_numbers_are_numbers(
    photos: Path, bundle: Path
) -> None:
    assert score(bundle, "--out", "plain.csv") == 0
    assert score(bundle, "--out", "safe.csv", "--csv-safe") == 0
    with open("plain.csv", newline="") as file:
        plain = list(csv.DictReader(file))
    with open("safe.csv", newline="") as file:
        safe = list(csv.DictReader(file))
    assert any(row["path"].startswith("=") for row in plain)
    for row in safe:
        assert not any(cell.startswith(STARTS) for cell in row.values())
    assert [row["path"] for row in safe] == [f"'{name}" for name in FORMULAS] + PLAIN + [
        "'=broken.jpg"
    ]
    columns = [name for name in COLUMNS if name != "path"]
    assert [[row[name] for name in columns] for row in safe] == [
        [row[name] for name in columns] for row in plain
    ]
    assert all(0 < float(row["probability"]) < 1 for row in safe if row["status"] == "ok")


@pytest.mark.parametrize("options", [[], ["--csv-safe"], ["--csv-safe", "--csv-bom"]])
@pytest.mark.parametrize("summary", [True, False])
def test_tables_are_read_back_as_they_were(
    photos: Path, bundle: Path, options: list[str], summary: bool
) -> None:
    assert score(bundle, "--out", "out.csv", *options) == 0
    if not summary and options:  # a plain table without a summary may be a safe one
        Path("out.summary.json").unlink()
    assert [row.path for row in table_reader.read(Path("out.csv"))] == [
        *FORMULAS,
        *PLAIN,
        "=broken.jpg",
    ]
    start = Path("out.csv").read_bytes()[:7]
    assert start == (b"\xef\xbb\xbfpath" if "--csv-bom" in options else b"path,st")


def test_safe_tables_are_evaluated(photos: Path, bundle: Path) -> None:
    score(bundle, "--out", "out.csv", "--csv-safe", "--csv-bom")
    rows = list(table_reader.read(Path("out.csv")))
    truth = [csv_line(["path", "label"])]
    truth += [csv_line([row.path, row.label]) for row in rows if row.label]
    Path("truth.csv").write_text("".join(truth))
    words = "--labels", "truth.csv", "--json", "figures.json", "--csv-safe"
    outputs = "--mistakes", "wrong.csv", "--confusion", "matrix.csv"
    assert fledge.main(["evaluate-scores", "out.csv", *words, *outputs]) == 0
    assert '"accuracy": 1.0' in Path("figures.json").read_text()


def test_the_outputs_of_an_evaluation_are_safe(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = ["=cmd|' /C calc'!A0", "@a", "b"]
    rows = [ScoreRow(f"-{n}.jpg", "ok", label, 0.5) for n, label in enumerate(labels)]
    with TableFile(Path("out.csv"), csv_safe=True) as table:
        table.append(rows)
    truth = [csv_line(["path", "label"])] + [csv_line([row.path, "=other"]) for row in rows]
    truth[-1] = csv_line([rows[-1].path, "b"])
    Path("truth.csv").write_text("".join(truth))
    words = ["evaluate-scores", "out.csv", "--labels", "truth.csv", "--mistakes", "wrong.csv",
             "--confusion", "matrix.csv"]  # fmt: skip
    assert fledge.main([*words, "--csv-safe"]) == 0
    for name in ("wrong.csv", "matrix.csv"):
        with open(name, newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not any(cell.startswith(STARTS) for cell in cells)
        assert "'=other" in cells
    assert fledge.main(words) == 0
    assert "\n=other," in Path("matrix.csv").read_text()


@pytest.mark.parametrize("option", ["--csv-safe", "--csv-bom"])
def test_the_options_are_for_csv_alone(
    photos: Path, bundle: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(bundle, "--out", "out.jsonl", option) == 2
    assert f"{option} is for CSV; use --out " in capsys.readouterr().err


@given(texts())
@examples(200)
def test_every_text_is_escaped_and_comes_back(text: str) -> None:
    for one in (text, f"={text}", f"'{text}", f"''+{text}", f"\uff1d{text}", f"\n{text}"):
        escaped = escape_formula(one)
        assert not escaped.startswith((*STARTS, "\n", "\uff1d"))
        assert unescape_formula(escaped) == one
        (cells,) = csv.reader(io.StringIO(csv_line([one, -1.5, None], safe=True), newline=""))
        assert cells == [escaped, "-1.5", ""]


def test_names_that_are_not_utf8_stay(tmp_path: Path) -> None:
    name = os.fsdecode(b"=\xff.jpg")
    with TableFile(tmp_path / "a.csv", csv_safe=True, csv_bom=True) as table:
        table.append([ScoreRow(name, "error", error="broken-image: x")])
    assert b"'=\xff.jpg" in (tmp_path / "a.csv").read_bytes()
    assert [row.path for row in table_reader.read(tmp_path / "a.csv")] == [name]
