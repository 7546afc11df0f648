"""Each input that docs/scoring.md lists is scored by the command, whatever stands beside it."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import fledge
from tests.support.tar_files import KINDS, write_tar
from tests.support.tiny_bundle import photo, tiny_bundle
from tests.support.zip_files import write_zip

DOCS = Path(__file__).parents[3] / "docs" / "scoring.md"
INPUTS = {
    "a folder": ["photos", "photo"],
    "a file": ["photos/1.jpg", "no_suffix", "jpeg.pt", "jpeg.toml", "jpeg.csv2"],
    "a pattern in quotes": ["'photos/**/*.jpg'", "'photo*'", "'photos/?.jpg'", "'*.zip'"],
    "`list.txt`": ["list.txt", "LIST.TXT"],
    "`list.csv`": ["list.csv", "list.tsv", "list.jsonl", "list.ndjson", "list.parquet"],
    "`-`": ["-"],
    "`a.zip`": ["a.zip", "a.zip::1.jpg"],
    "`a.tar`": [*(f"a{suffix}" for suffix in KINDS), "a.tbz2", "a.txz", "a.tar::1.jpg"],
    "`'data-{000..012}.tar'`": ["'data-{000..001}.tar'"],
    "`s3://bucket/photos`": ["file://HERE/photos", "'file://HERE/photos/*.jpg'"],
    "such addresses in a list": ["addresses.txt"],
}
"""Beginning of a row of the table -> inputs of that kind, as they are written in a shell."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The inputs, and beside them files and folders of similar names."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/1.jpg", "photos/sub/2.jpg", "photo/3.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(photo(1))
    for name in ("no_suffix", "jpeg.pt", "jpeg.toml", "jpeg.csv2"):
        Path(name).write_bytes(photo(2))
    for name in ("list.txt", "LIST.TXT"):
        Path(name).write_text("photos/1.jpg\n")
    Path("addresses.txt").write_text(f"file://{tmp_path}/photos/1.jpg\n")
    for suffix in ("csv", "tsv"):
        Path(f"list.{suffix}").write_text("path\nphotos/1.jpg\n")
    for suffix in ("jsonl", "ndjson"):
        Path(f"list.{suffix}").write_text(json.dumps({"path": "photos/1.jpg"}) + "\n")
    write_zip("a.zip", [("1.jpg", photo(1))])
    members = [("1.jpg", photo(1))]
    for suffix, mode in (KINDS | {".tbz2": "w:bz2", ".txz": "w:xz"}).items():
        write_tar(f"a{suffix}", members, mode)
    for number in range(2):
        write_tar(f"data-{number:03}.tar", members)
    return tmp_path


def test_each_row_of_the_table_is_tried() -> None:
    table = DOCS.read_text("utf-8").partition("| input | what is scored |\n|---|---|\n")[2]
    rows = table.partition("\n\n")[0].splitlines()
    assert len(rows) == len(INPUTS)
    for row, start in zip(rows, INPUTS, strict=True):
        assert row.startswith(f"| {start}"), row


@pytest.mark.parametrize("word", [word for words in INPUTS.values() for word in words])
def test_it_is_scored(
    word: str,
    here: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if word == "list.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"path": ["photos/1.jpg"]}), word)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"photos/1.jpg\n")))
    words = shlex.split(re.sub("HERE", str(here), word))
    more = ["--bundle", str(bundle), "--out", "scores.csv", "--device", "cpu"]
    assert fledge.main(["score", *words, *more]) == 0, capsys.readouterr().err
    with open("scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("phtos", "phtos: not there; did you mean photos? Else give folders"),
        ("'phto*'", "phto*: matches no images"),
        ("a.7z", "a.7z: a 7z archive is not read"),
        ("photos/1.jpeg", "did you mean photos/1.jpg?"),
        ("labels.xlsx", ""),
    ],
)
def test_what_is_no_input_is_told_by_the_scorer(
    word: str, told: str, here: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.7z").touch()
    Path("labels.xlsx").write_bytes(b"PK\3\4 a spreadsheet")
    more = ["--bundle", str(bundle), "--out", "scores.csv", "--device", "cpu"]
    assert fledge.main(["score", *shlex.split(word), *more]) != 0
    error = capsys.readouterr().err
    assert told in error
    assert "not photos" not in error
