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


def test_a_number_too_large_for_a_float_is_no_probability(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**ROW, "probability": 10**400}) + "\n")
    with pytest.raises(DataError, match="is no probability") as caught:
        list(read(path))
    assert len(str(caught.value)) < 300
    path.write_text(json.dumps({**ROW, "probabilities": [10**400]}) + "\n")
    (row,) = read(path)
    with pytest.raises(DataError, match="no list of numbers"):
        row.probabilities()


def test_a_parquet_file_with_a_negative_number_of_rows_is_refused(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"other": ["x"]}), path)
    data = path.read_bytes()
    footer = data.rindex(b"\x16\x02\x19\x1c")  # one row, then the list of row groups
    data = data[: footer + 1] + b"\x01" + data[footer + 2 :]
    rows = data.rindex(b"\x16\x02", footer)  # one row of the row group
    path.write_bytes(data[: rows + 1] + b"\x01" + data[rows + 2 :])
    with pytest.raises(DataError, match="no Parquet file that can be read"):
        list(read(path))
