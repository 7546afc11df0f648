"""Laws of tables of scores: each format gives back the rows that were written."""

from __future__ import annotations

import csv
import io
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from serving.evaluation.table_reader import read
from serving.scoring.row_writers import csv_line
from serving.scoring.rows import COLUMNS, PROBABILITIES, ScoreRow
from serving.scoring.table import TableFile
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import file_names, texts

SHARES = st.floats(0, 1)
# Bytes that are not UTF-8 are surrogates in a path. `lists` escapes all other lone surrogates.
NAMES = texts(min_size=1) | file_names()
LABELS = texts(min_size=1)


@st.composite
def rows(draw: st.DrawFn) -> ScoreRow:
    path = draw(NAMES)
    if draw(st.booleans()):
        return ScoreRow(path, "error", error=f"broken-image: {draw(NAMES)}")
    top = tuple(draw(st.lists(st.tuples(LABELS, SHARES), min_size=1, max_size=3)))
    label, probability = top[0]
    return ScoreRow(
        path,
        "ok",
        label,
        probability,
        draw(st.none() | st.booleans()),
        top,
        draw(st.integers(1, 10)),
        draw(st.sampled_from(["", "exif-orientation;icc-to-srgb"])),
        probabilities=tuple(draw(st.lists(SHARES, min_size=1, max_size=4))),
    )


def plain(text: str) -> str:
    """The text as Parquet keeps it: bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@given(st.lists(rows(), max_size=5), st.sampled_from([".csv", ".jsonl", ".parquet"]))
@examples(50)
def test_a_table_has_the_rows_that_were_written(rows, suffix) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, f"scores{suffix}")
        with TableFile(out, [*COLUMNS, PROBABILITIES]) as table:
            for row in rows:  # in two steps, as from two shards
                table.append([row])
        found = list(read(out))
    assert len(found) == len(rows)
    for row, one in zip(rows, found, strict=True):
        if row.status == "error":
            assert (one.code, one.label) == ("broken-image", "")
            continue
        assert (one.code, one.label, one.probability) == (None, row.label, row.probability)
        assert (one.confident, one.top_k()) == (row.confident, row.top_k)
        assert tuple(one.probabilities()) == row.probabilities


@given(rows())
@examples(100)
def test_a_row_of_the_journal_is_read_back(row) -> None:
    line = row.to_json()
    assert line.isascii()
    assert line.count("\n") == 1
    assert ScoreRow.from_json(line) == row
    assert ScoreRow.from_json(replace(row, path="").to_json()) == replace(row, path="")


@given(st.lists(st.lists(texts(surrogates=True), min_size=2, max_size=4), max_size=4))
@examples(60)
def test_csv_cells_are_read_back(records) -> None:
    text = "".join(map(csv_line, records))
    assert list(csv.reader(io.StringIO(text, newline=""), strict=True)) == records
