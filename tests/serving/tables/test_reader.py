"""Tables as other programs write them: encodings, delimiters, quotes, with and without a header."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import DataError
from serving.tables import reader
from serving.tables.columns import find_labels, find_paths
from serving.tables.dialect import HEAD
from serving.tables.reader import EmptyTable, open_table
from tests.support.hypothesis_profiles import examples

ROWS = [["1.jpg", "café, small"], ["a b/2.jpg", 'the "big" one'], ["3.jpg", "x;y"]]


def read(path: Path) -> list[list[Any]]:
    table = open_table(path)
    return [list(row.values) for row in table.rows(range(len(table.columns)))]


def quote(field: str, delimiter: str) -> str:
    special = any(c in field for c in f'{delimiter}"')
    return '"' + field.replace('"', '""') + '"' if special else field


def text(delimiter: str, space: str, end: str, header: list[str] | None) -> str:
    lines = [[quote(field, delimiter) for field in row] for row in ROWS]
    return end.join(
        (delimiter + space).join(row) for row in [*([header] if header else []), *lines]
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_text_tables_of_any_program_are_read(
    tmp_path: Path, delimiter: str, end: str, encoding: str
) -> None:
    for space in ("", " "):
        for header in (["id", "label"], None):
            for name in ("t.csv", "t.tsv", "t.txt"):
                path = tmp_path / name
                path.write_bytes(text(delimiter, space, end, header).encode(encoding))
                table = open_table(path)
                assert table.columns == (("id", "label") if header else ("1", "2"))
                assert table.named == (header is not None)
                assert read(path) == ROWS
                numbers = [row.number for row in table.rows([0])]
                assert numbers == [n + (header is not None) for n in (1, 2, 3)]


def test_a_line_with_the_delimiter_as_spreadsheets_write_it_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sep=;\nid;label\n1.jpg;a,b\n")
    assert read(tmp_path / "t.csv") == [["1.jpg", "a,b"]]
    assert [row.number for row in open_table(tmp_path / "t.csv").rows([0])] == [3]


def test_comments_before_the_table_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("# made by a camera trap\n# 2026\nid,label\n1.jpg,a\n")
    assert [(row.number, row.values) for row in open_table(path).rows([0, 1])] == [
        (4, ("1.jpg", "a"))
    ]
    path.write_text("#filename,label\n1.jpg,a\n")
    assert read(path) == [["1.jpg", "a"]]
    path.write_text('#1.jpg\n"2,3.jpg"\n')
    assert read(path) == [["#1.jpg"], ["2,3.jpg"]]


def test_a_text_file_may_separate_by_spaces(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("val/1.jpg 65\nval/2.jpg  970\n")
    assert read(tmp_path / "t.txt") == [["val/1.jpg", "65"], ["val/2.jpg", "970"]]


def test_json_lines_and_parquet_have_the_same_rows(tmp_path: Path) -> None:
    first, second = '{"id": "1.jpg", "label": 0.0, "n": null}', '{"label": "é", "id": "2.jpg"}'
    (tmp_path / "t.jsonl").write_bytes(f"\ufeff{first}\r\n\n{second}\n7".encode())
    table = open_table(tmp_path / "t.jsonl")
    rows = list(table.rows([1, 0]))
    assert [(row.number, row.values) for row in rows] == [
        *((1, (0.0, "1.jpg")), (3, ("é", "2.jpg")), (4, (None, None)))
    ]
    assert rows[2].wrong == "no JSON object"
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"label": ["é", None], "x": [1, 2], "id": [b"\xff.jpg", b"2.jpg"]}
    for name in ("t.parquet", "really-parquet.csv"):
        parquet.write_table(arrow.table(columns), tmp_path / name)
        table = open_table(tmp_path / name)
        assert [(row.number, row.values) for row in table.rows([2, 0])] == [
            *((1, (os.fsdecode(b"\xff.jpg"), "é")), (2, ("2.jpg", None)))
        ]


@pytest.mark.parametrize("line", ["{}", "7", "x.jpg", "[]"])
def test_json_lines_that_name_no_columns_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(
        DataError, match=r't\.jsonl: its first line is no JSON object, such as \{"pa'
    ):
        open_table(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf\r\n \r\n", "it is empty"),
        (b"PK\x03\x04" + bytes(99), "it is a spreadsheet or zip archive; save the sheet as 'CSV U"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "it is a spreadsheet; save the sheet"),
        (b"\n<!DOCTYPE html><p>404", "it is a web page, not a table; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS, not the f"),
        (
            b' [\n  {"id": "1.jpg"}]',
            "it is a JSON array; write an object a line: jq -c '.\\[]' .*t.c",
        ),
        (bytes(1000), "it is mostly NUL bytes, so it is no text"),
        ("id,label\n".encode("utf-16")[:-1], "can't be read: .*truncated data"),
    ],
)
def test_what_is_no_table_is_one_line_that_says_what_it_is(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(DataError, match=rf"t\.csv: {message}") as refused:
        read(tmp_path / "t.csv")
    assert isinstance(refused.value, EmptyTable) == (message == "it is empty")
    assert "\n" not in str(refused.value)


def test_mistakes_in_quotes_name_the_line_where_the_row_begins(tmp_path: Path) -> None:
    for body, message in (
        ('a,b\nc,"d\n\ne', "line 2: a quote is not closed before the end of the file"),
        ('a,b\n\n"x" y,d\n', "line 3: text after a closing quote; write a quote within"),
    ):
        (tmp_path / "t.csv").write_text(body)
        with pytest.raises(DataError, match=message):
            read(tmp_path / "t.csv")


def test_rows_of_more_fields_than_columns_say_so(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,label\na,b,,\nc,d,e\nf\n")
    rows = list(open_table(tmp_path / "t.csv").rows([0, 1]))
    assert [(row.number, row.values, row.fields) for row in rows] == [
        *((2, ("a", "b"), 4), (3, ("c", "d"), 3), (4, ("f", None), 1))
    ]
    assert [bool(row.wrong) for row in rows] == [False, True, False]
    assert rows[1].wrong.startswith("3 fields, and the first line has 2 columns; quote")


def test_a_table_from_a_pipe_is_read(tmp_path: Path) -> None:
    code = (
        "import sys; from serving.tables.reader import open_table; t = open_table(sys.argv[1]);"
        "print([row.values for row in t.rows([1, 0])])"
    )
    (tmp_path / "t.csv").write_text("id;label\n1.jpg;ants\n")
    script = f"{sys.executable} -c '{code}' <(cat {tmp_path}/t.csv)"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[('ants', '1.jpg')]\n", done.stderr


def test_a_large_table_is_recognised_from_its_head_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"id;label\n" + b"1.jpg;ants\n" * (HEAD // 5) + b'x;"torn')
    rows = open_table(path).rows([1])
    assert next(rows).values == ("ants",)
    with pytest.raises(DataError, match=r"line \d+: a quote is not closed"):
        list(rows)


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=8)


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6), st.sampled_from(",;\t|"))
@examples(40)
def test_whatever_is_quoted_is_read_back(tmp_path_factory: Any, rows: Any, delimiter: str) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    lines = [["id", "label"], *rows]
    quoted = [[f'"{field.replace(chr(34), chr(34) * 2)}"' for field in line] for line in lines]
    path.write_text("\n".join(delimiter.join(line) for line in quoted), encoding="utf-8")
    assert read(path) == [list(row) for row in rows if any(field.strip() for field in row)]


# ---- columns


def columns(path: Path, first: str, *rows: str, asked: Any = (None, None)) -> list[str]:
    path.write_text("\n".join((first, *rows)) + "\n")
    table = open_table(path, [name for name in asked if name])
    paths = find_paths(table, asked[0], path.name, lambda name: f"--path-column {name}")
    labels = find_labels(table, asked[1], paths, path.name, lambda name: f"--labels-column {name}")
    return [table.columns[paths], table.columns[labels]]


@pytest.mark.parametrize(
    ("first", "row", "expected"),
    [
        ("id,label", "1,x", "id label"),
        ("Image_ID;Class Name", "1;x", "Image_ID,Class Name"),
        ("breed,filename", "x,1.jpg", "filename breed"),
        ("n,image,w,h,species", "0,1.jpg,9,9,x", "image species"),
        ("id,filename,label", "7,1.jpg,x", "filename label"),
        ("path,pokemon", "1.jpg,x", "path pokemon"),
        ("foo,bar", "x,1.jpg", "bar foo"),
        ("label,category,file", "x,y,1.jpg", "file label"),
        ("1.jpg,cat", "2.jpg,dog", "1 2"),
        ("cat\t1.jpg", "dog\t2.jpg", "2 1"),
    ],
)
def test_columns_are_found_by_usual_names_or_by_the_names_of_images(
    tmp_path: Path, first: str, row: str, expected: str
) -> None:
    found = columns(tmp_path / "t.csv", first, row)
    assert found == expected.split("," if "," in expected else " ")


@pytest.mark.parametrize(
    ("first", "row", "message"),
    [
        ("a,b,c", "x,y,z", "no column of photos among 'a', 'b', 'c'; .*: --path-column a$"),
        ("image,a,b", "1.jpg,y,z", "no column of labels among 'image', 'a', 'b'; .*-column a$"),
        ("image,class,genus,species", "1.jpg,,,", "several columns of labels among 'class', 'spec"),
        (
            "img,photo,label",
            "1.jpg,2.jpg,x",
            "several columns of photos among 'img', 'photo'; .*img",
        ),
    ],
)
def test_columns_that_can_not_be_told_are_named_with_the_option_that_settles_it(
    tmp_path: Path, first: str, row: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
        columns(tmp_path / "t.csv", first, row)
    option, name = str(refused.value).rsplit(None, 2)[-2:]
    asked = (name, None) if option == "--path-column" else (None, name)
    columns(tmp_path / "t.csv", first, row, asked=asked if "a,b,c" not in first else (name, "b"))


def test_columns_that_are_asked_for_may_be_spelled_loosely_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    asked = ("IMAGE NAME", "Kind-of")
    assert columns(path, "image_name,kind of,x", "1,2,3", asked=asked) == ["image_name", "kind of"]
    assert columns(path, "x,0007,cat", "y,0008,dog", asked=("2", "3")) == ["2", "3"]
    assert columns(path, "foo,bar,label", "y,0008,dog", asked=("2", "3")) == ["bar", "label"]
    with pytest.raises(DataError, match="no column '4' among 'foo', 'bar', 'label'"):
        columns(path, "foo,bar,label", "y,0008,dog", asked=("4", "3"))


def test_a_row_of_json_with_a_key_twice_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"path": "1.jpg", "label": "cat", "label": "dog"}\n{"path": "2.jpg", "label": "cat"}\n'
        '{"path": "3.jpg", "label": {"a": 1, "a": 2}}\n'
    )
    rows = list(open_table(path).rows([0, 1]))
    assert [row.wrong for row in rows] == [
        "key 'label' is there twice",
        "",
        "key 'a' is there twice",
    ]


def test_a_table_that_is_kept_in_memory_has_a_largest_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("path,label\n" + "1.jpg,cat\n" * 3)
    monkeypatch.setattr(reader, "MAX_ROWS", 3)
    assert len(list(reader.limited_rows(open_table(path), [0]))) == 3
    monkeypatch.setattr(reader, "MAX_ROWS", 2)
    with pytest.raises(DataError, match=r"t\.csv: more than 2 rows, the most that are read; keep"):
        list(reader.limited_rows(open_table(path), [0]))
