"""Laws of lists: the paths that were written are read, whatever they contain."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from serving.inputs import lists
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts

# A path is any bytes but NUL. A byte-order mark at the start of a list is none of its text.
PATHS = st.lists(
    (texts(min_size=1) | st.binary(min_size=1, max_size=8).map(os.fsdecode))
    .map(lambda path: path.replace("\0", ""))
    .filter(lambda path: path.strip() and not path.startswith("\ufeff")),
    max_size=8,
)


class Pipe(io.RawIOBase):
    """A stream that returns its bytes in pieces of the given sizes."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = io.BytesIO(data), sizes

    def read(self, size: int = -1) -> bytes:
        piece = self._sizes.pop() if self._sizes else 2**16
        return self._data.read(min(piece, size))


def read_lines(data: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "list.txt")
        path.write_bytes(data)
        return list(lists.read_lines(str(path), fail))


def fail(message: str) -> None:
    raise AssertionError(message)


PIECES = st.lists(st.integers(1, 9), max_size=12)
LINE_ENDS = st.sampled_from(["\n", "\r\n"])


@given(PATHS, LINE_ENDS, st.booleans(), st.booleans(), PIECES)
@examples(100)
def test_a_list_of_lines_is_read_back(paths, end, ended, mark, pieces) -> None:
    paths = [path.replace("\n", "").rstrip("\r") or "a" for path in paths]
    text = end.join(paths) + end * (ended and bool(paths))
    data = b"\xef\xbb\xbf" * mark + os.fsencode(text)
    assert read_lines(data) == [path for path in paths if path.strip()]
    assert list(lists.read_stream(Pipe(data, pieces))) == read_lines(data)


@given(PATHS, PIECES, st.booleans())
@examples(100)
def test_paths_between_nul_bytes_are_read_back_with_line_breaks_in_them(
    paths, pieces, ended
) -> None:
    data = os.fsencode("\0".join(paths) + "\0" * ended)
    if b"\0" in data:
        assert list(lists.read_stream(Pipe(data, pieces))) == paths


@given(
    st.binary(max_size=60) | st.binary(max_size=6).map(lambda data: data * 900),
    PIECES | st.just([4096, 1, 1]) | st.just([1, 1, 4095]),
)
@examples(100)
def test_the_paths_of_a_stream_do_not_depend_on_its_pieces(data, pieces) -> None:
    whole = list(lists.read_stream(io.BytesIO(data)))
    assert list(lists.read_stream(Pipe(data, pieces))) == whole


@given(PATHS, st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), st.integers(0, 2))
@examples(40)
def test_a_column_of_paths_is_read_back(paths, suffix, place) -> None:
    if suffix == ".parquet":  # its texts are UTF-8
        paths = [path for path in paths if path.isprintable()]
    columns = ["id", "note"]
    columns.insert(place, "path")
    records = [{"id": "7", "note": 'a "b", c', "path": path} for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"list{suffix}")
        if suffix == ".parquet":
            import pyarrow as pa
            from pyarrow import parquet

            table = {
                name: pa.array([one[name] for one in records], pa.string()) for name in columns
            }
            parquet.write_table(pa.table(table), path)
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                delimiter = "\t" if suffix == ".tsv" else ","
                writer = csv.DictWriter(file, columns, delimiter=delimiter)
                writer.writeheader()
                writer.writerows(records)
        if not paths and suffix == ".jsonl":
            return
        table, column = lists.open_list(str(path), None)
        assert table.columns[column] == "path"
        assert list(lists.read_column(table, column, fail)) == paths


@given(st.lists(texts(min_size=1, surrogates=True), min_size=1, max_size=5))
@examples(60)
def test_each_path_of_a_json_list_is_read_back_or_noted(paths) -> None:
    """JSON can contain lone surrogates, which neither a file name nor a table can have."""
    paths = [json.loads(json.dumps(path)) for path in paths if path.strip()]
    possible = [path for path in paths if is_possible(path)]
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "list.jsonl")
        file.write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
        if not paths:
            return
        found = lists.read_column(*lists.open_list(str(file), None), notes.append)
        assert list(found) == possible
    left_out = len(paths) - len(possible)
    assert len(notes) == bool(left_out)
    assert not notes or f"left out: {left_out}," in notes[0]


def is_possible(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True
