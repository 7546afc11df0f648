"""Tables of scores with hostile JSON are refused like other broken JSON."""

import json
from pathlib import Path

import pytest

from serving.errors import DataError
from serving.evaluation.table_reader import read
from serving.scoring.summary import read_classes

DEEP = "[" * 100_000 + "]" * 100_000
ROW = {"path": "a.jpg", "status": "ok", "label": "x", "probability": 0.5}


def test_a_line_nested_too_deep_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(DEEP)
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: no JSON"):
        list(read(path))


@pytest.mark.parametrize("column", ["top_k", "probabilities"])
def test_a_cell_nested_too_deep_is_no_json(tmp_path: Path, column: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**ROW, column: DEEP}) + "\n")
    (row,) = read(path)
    with pytest.raises(DataError, match=f"line 1: {column} is no JSON"):
        getattr(row, column)()


def test_a_summary_nested_too_deep_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "t.summary.json").write_text(DEEP)
    assert read_classes(tmp_path / "t.csv") is None


def test_a_probability_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**ROW, "probability": 10**400}) + "\n")
    with pytest.raises(DataError, match="line 1: "):
        list(read(path))
