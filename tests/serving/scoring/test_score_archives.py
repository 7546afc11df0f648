"""Scoring a zip gives the table of its folder, also after an interruption."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from serving.scoring import journal
from serving.scoring.options import ScoringOptions
from serving.scoring.score import score
from tests.support.tiny_bundle import photo, tiny_bundle
from tests.support.zip_files import write_zip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", classes=7)


@pytest.fixture
def members() -> dict[str, bytes]:
    """Photos and broken files, in the order in which a folder lists them."""
    names = [f"{label}/{number}.jpg" for label in ("ants", "bees") for number in range(7)]
    found = {name: photo(number) for number, name in enumerate(names)}
    found["bees/7.jpg"] = b"hello"
    found["bees/8.jpg"] = photo(8)[:400]
    return found


def rows(table: Path) -> list[dict[str, Any]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def run(source: Path, bundle: Path, out: Path) -> None:
    score([str(source)], bundle, out, ScoringOptions(device="cpu", batch=3), log=lambda _: None)


def test_a_zip_is_scored_as_its_folder(
    tmp_path: Path, bundle: Path, members: dict[str, bytes]
) -> None:
    others = {"__MACOSX/ants/._0.jpg": b"x", "README.txt": b"x", "bees/": b""}
    archive = tmp_path / "photos.zip"
    write_zip(str(archive), [*members.items(), *others.items()], zipfile.ZIP_DEFLATED)
    for name, data in members.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    run(archive, bundle, tmp_path / "zip.csv")
    run(tmp_path / "photos", bundle, tmp_path / "folder.csv")
    by_zip, by_folder = rows(tmp_path / "zip.csv"), rows(tmp_path / "folder.csv")
    assert [row.pop("path") for row in by_zip] == [f"{archive}::{name}" for name in members]
    assert [Path(row.pop("path")).name for row in by_folder] == [Path(n).name for n in members]
    assert by_zip == by_folder
    summary = json.loads((tmp_path / "zip.summary.json").read_text())
    assert summary["passed_over"] == {"system": 1, "not-an-image": 1}


def test_an_interrupted_job_on_a_zip_goes_on_where_it_was(
    tmp_path: Path, bundle: Path, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path(write_zip(str(tmp_path / "photos.zip"), members.items()))
    run(archive, bundle, tmp_path / "expected.csv")
    monkeypatch.setattr(journal, "SIZE", 4)
    write, calls = journal.ScoringJournal.write, list[int]()

    def interrupted(self: journal.ScoringJournal, number: int, *rows: Any) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, number, *rows)

    monkeypatch.setattr(journal.ScoringJournal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(archive, bundle, tmp_path / "out.csv")
    run(archive, bundle, tmp_path / "out.csv")
    assert calls == [0, 1, 2, 2, 3]
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
