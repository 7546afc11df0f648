"""Laws of a table that is a folder: whole or not there, in order, nobody else's files touched."""

from pathlib import Path

import numpy as np
import pytest

from serving.errors import OptionError, WorkError
from serving.evaluation import score_table
from serving.scoring import table_folder as parts
from serving.scoring.table import ScoreRow
from serving.scoring.table_folder import TableFolder

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


def test_rows_come_back_in_order_from_files_of_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS", 8)
    write(tmp_path / "scores", 21)
    names = [f"part-0000{number}.parquet" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == names
    answers = list(score_table.read(tmp_path / "scores"))
    assert [answer.path for answer in answers] == [f"{number}.jpg" for number in range(21)]
    write(tmp_path / "scores", 5)
    assert len(list(score_table.read(tmp_path / "scores"))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_an_error_leaves_the_older_table(tmp_path: Path) -> None:
    out = tmp_path / "scores"
    write(out, 3)
    with pytest.raises(RuntimeError):
        interrupted(out)
    assert len(list(score_table.read(out))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_table_that_can_t_take_its_name_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "scores", Path.rename
    write(out, 3)

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".scores.partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WorkError, match="No space left"):
        write(out, 5)
    assert len(list(score_table.read(out))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_what_a_kill_has_left_is_no_hindrance(tmp_path: Path) -> None:
    out = tmp_path / "scores"
    for name in (".scores.partial", ".scores.older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00007.parquet").write_text("half")
    write(out, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    for name in ("notes.md", "part-1.parquet.bak"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OptionError, match="there, and no table; name another"):
            parts.check(tmp_path)
        (tmp_path / name).unlink()
    parts.check(tmp_path)  # an empty one is taken
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="no table"):
        parts.check(tmp_path / "file")
    with pytest.raises(OptionError, match="no folder"):
        parts.check(tmp_path / "none" / "scores")
