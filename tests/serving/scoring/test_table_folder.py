"""A table as a folder: complete or absent, rows in order, other files untouched."""

from pathlib import Path

import numpy as np
import pytest

from serving.errors import OptionError, WorkError
from serving.evaluation import table_reader
from serving.scoring import table_folder
from serving.scoring.rows import ScoreRow
from serving.scoring.table_folder import TableFolder, check_table_folder
from serving.utils import files

COLUMNS = ("path", "status", "label", "probability", "error", "features")


def row(number: int) -> ScoreRow:
    return ScoreRow(f"{number}.jpg", "ok", "rose", 0.5)


def write(out: Path, rows: int, each: int = 4) -> None:
    with TableFolder(out, COLUMNS) as table:
        for start in range(0, rows, each):
            some = [row(number) for number in range(start, min(start + each, rows))]
            table.append(some, np.ones((len(some), 3), np.float32))


def interrupted(out: Path) -> None:
    with TableFolder(out, COLUMNS) as table:
        table.append([row(0)], np.ones((1, 3), np.float32))
        raise RuntimeError


def test_rows_are_split_into_files_and_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_folder, "ROWS", 8)
    write(tmp_path / "scores", 21)
    names = [f"part-0000{number}.parquet" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == names
    answers = list(table_reader.read(tmp_path / "scores"))
    assert [answer.path for answer in answers] == [f"{number}.jpg" for number in range(21)]
    write(tmp_path / "scores", 5)
    assert len(list(table_reader.read(tmp_path / "scores"))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_an_error_keeps_the_older_table(tmp_path: Path) -> None:
    out = tmp_path / "scores"
    write(out, 3)
    with pytest.raises(RuntimeError):
        interrupted(out)
    assert len(list(table_reader.read(out))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_failed_rename_keeps_the_older_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "scores", Path.rename
    write(out, 3)

    failed: list[Path] = []

    def failing(self: Path, target: Path) -> Path:
        if files.partial_of(self.name) == "scores" and not failed:
            failed.append(self)
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(files, "exchange", lambda one, other: False)  # as a system without it
    with pytest.raises(WorkError, match="No space left"):
        write(out, 5)
    assert len(list(table_reader.read(out))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "scores"
    for name in (".scores.0123456789abcdef.partial", ".scores.fedcba9876543210.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00007.parquet").write_text("half")
        (tmp_path / name).chmod(0o1755)
    write(out, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    for name in ("notes.md", "part-1.parquet.bak"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OptionError, match="exists and is not a table; name another"):
            check_table_folder(tmp_path)
        (tmp_path / name).unlink()
    check_table_folder(tmp_path)  # an empty folder is accepted
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="is not a table"):
        check_table_folder(tmp_path / "file")
    with pytest.raises(OptionError, match="no folder"):
        check_table_folder(tmp_path / "none" / "scores")
