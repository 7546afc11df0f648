"""Lists of inputs: every path in order; rows without a path are noted."""

import importlib.util
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from serving.errors import DataError, RequestError
from serving.inputs import lists, sources

LATIN = os.fsdecode(b"latin-\xff.jpg")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*words: str, notes: list[str] | None = None, **options: Any) -> list[str]:
    note = [].append if notes is None else notes.append
    return list(sources.find(words, note=note, **options))


def write(name: str, text: str) -> str:
    Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return name


def parquet(name: str, **columns: Any) -> str:
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow.table(columns), name, row_group_size=2)
    return name


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_text_list_has_a_path_in_each_line(folder: Path, start: str, end: str) -> None:
    paths = ["a b.jpg", " lead.jpg", "a b.jpg", LATIN, "gone/x.jpg", "a.tar::x.jpg", "nul\0.jpg"]
    text = start + end.join(["", *paths, " ", ""])
    assert found(write("list.TXT", text)) == paths
    assert found(write("list.txt", text.rstrip(f" {end}"))) == paths  # no line break at the end


def test_lists_and_folders_in_a_text_list_are_not_expanded(folder: Path) -> None:
    write("inner.txt", "a.jpg\n")
    (folder / "folder").mkdir()
    assert found(write("list.txt", "inner.txt\nfolder\n*.jpg\n-\n")) == [
        *("inner.txt", "folder", "*.jpg", "-")
    ]


def test_a_file_without_lines_does_not_fill_the_memory(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"x" * 3_000_000 + b"\na.jpg\n")
    first, second = found("list.txt")
    assert len(first) < 200_000
    assert second == "a.jpg"


TABLE = f'label,path,x\nrose,"a, b.jpg",1\n\ntulip,"line\nbreak.jpg",2\nrose,{LATIN},3\n,a.jpg,\n'
PATHS = ["a, b.jpg", "line\nbreak.jpg", LATIN, "a.jpg"]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_list_has_a_column_of_paths(folder: Path, start: str, end: str) -> None:
    text = start + TABLE.replace("\n", end).replace(f"line{end}break", "line\nbreak")
    notes: list[str] = []
    assert found(write("list.csv", text), notes=notes) == PATHS
    assert found("list.csv", column="path") == PATHS
    assert found("list.csv", column="x") == ["1", "2", "3"]
    assert notes == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "label\tpath\nrose\ta, b.jpg\n"),
        ("a.csv", "label;path\nrose;a, b.jpg\n"),
        ("a.csv", '\n\nfile\n"a, b.jpg"\n'),
        ("a.csv", 'file,path\nx.jpg,"a, b.jpg"\n'),
        ("a.csv", '\ufeffpath,file\n"a, b.jpg",x.jpg\n'),
        ("a.csv", f'path,all\n"a, b.jpg","{"0.5, " * 100_000}"\n'),
        ("a.jsonl", '{"label": "rose", "path": "a, b.jpg"}'),
        ("a.jsonl", '\ufeff\n{"file": "a, b.jpg"}\n'),
    ],
)
def test_the_default_column_is_path_or_the_only_one(folder: Path, name: str, text: str) -> None:
    assert found(write(name, text)) == ["a, b.jpg"]


def test_line_breaks_within_quotes_stay_as_they_are(folder: Path) -> None:
    assert found(write("list.csv", 'path\r\n"a\r\nb.jpg"\r\n"c\rd.jpg"\r\n')) == [
        *("a\r\nb.jpg", "c\rd.jpg")
    ]


def test_a_json_list_has_a_key_of_paths(folder: Path) -> None:
    rows = [{"path": path, "file": "f.jpg"} for path in (*PATHS, "\x85\u2028.jpg")]
    text = "\n".join(json.dumps(row) for row in rows)
    assert found(write("list.jsonl", text)) == [*PATHS, "\x85\u2028.jpg"]
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert found(write("list.jsonl", text)) == [*PATHS, "\x85\u2028.jpg"]
    assert found("list.jsonl", column="file") == ["f.jpg"] * 5


def test_a_parquet_list_has_a_column_of_paths(folder: Path) -> None:
    paths = ["a.jpg", "ü.jpg", "b.jpg", "a.jpg", "c.jpg"]
    name = parquet("list.parquet", label=list("xyzzy"), path=paths)
    assert found(name) == found(name, column="path") == paths
    assert found(parquet("one.parquet", file=[b"latin-\xff.jpg", b"a.jpg"])) == [LATIN, "a.jpg"]


def test_the_error_for_parquet_without_pyarrow_names_the_extra(
    folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install pyarrow"):
        found(write("list.parquet", ""))


@pytest.mark.parametrize(
    ("name", "text", "column", "words"),
    [
        ("a.csv", "a,b b\nx,y\n", None, "no column of photos among 'a', 'b b'; .*: --column a$"),
        (
            "a.csv",
            "file,label\nx,y\n",
            "x",
            "no column 'x' among 'file', 'label'; .*--column file$",
        ),
        ("a.jsonl", '{"a": 1, "b": 2}', None, "no column of photos among 'a', 'b'"),
        ("a.csv", "path,path\nx,y\n", None, "2 columns are called path; rename one"),
        ("a.csv", "img,photo\nx.jpg,y.jpg\n", None, "several columns of photos among 'img', 'ph"),
        ("a.csv", "", None, "it is empty"),
        ("a.csv", "\n\n", None, "it is empty"),
        ("a.jsonl", "\n", None, "it is empty"),
        ("a.jsonl", '"x.jpg"\n', None, "first line is no JSON object"),
        ("a.jsonl", "x.jpg\n", None, "first line is no JSON object"),
        ("a.csv", "path\n", None, "lists no images in path"),
        ("a.csv", '"path\nx.jpg\n', None, "a.csv, line 1: a quote is not closed"),
        ("a.txt", " \n\n", None, "lists no images; write one path a line"),
    ],
)
def test_a_list_that_can_not_be_used_is_one_line(
    folder: Path, name: str, text: str, column: str | None, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        sources.find([write(name, text)], column=column)
    assert "\n" not in str(caught.value)
    write("x.jpg", "")
    if "lists no images" not in str(caught.value):
        with pytest.raises(DataError, match=words):  # before the first name
            sources.find(["x.jpg", name], column=column)


def test_rows_without_a_path_are_counted_and_noted(folder: Path) -> None:
    notes: list[str] = []
    write("a.csv", "label,path\nx,a.jpg\nx\n\nx,\nx, \n,b.jpg\n,\n")
    assert found("a.csv", notes=notes) == ["a.jpg", "b.jpg"]
    assert notes == ["a.csv: rows without a path in path are left out: 3, the first is line 3"]
    notes.clear()
    deep = "[" * 100_000
    lines = ['{"path": "a.jpg"}', "", "oops", '{"path": 3}', "{}", '{"path": "b.jpg"}', deep]
    assert found(write("a.jsonl", "\n".join(lines)), notes=notes) == ["a.jpg", "b.jpg"]
    assert notes == ["a.jsonl: rows without a path in path are left out: 4, the first is line 3"]


def test_rows_without_a_path_of_parquet_are_counted_and_noted(folder: Path) -> None:
    notes: list[str] = []
    name = parquet("a.parquet", path=["a.jpg", None, "", "b.jpg"], number=[1, 2, 3, 4])
    assert found(name, notes=notes) == ["a.jpg", "b.jpg"]
    assert notes == ["a.parquet: rows without a path in path are left out: 2, the first is row 2"]
    with pytest.raises(DataError, match=r"lists no images in number .*left out: 4"):
        found(name, column="number")


def test_the_rows_of_a_list_after_a_broken_one_are_left_out_with_a_note(folder: Path) -> None:
    notes: list[str] = []
    assert found(write("a.csv", 'path\na.jpg\nb.jpg\n"c.jpg\n'), notes=notes) == ["a.jpg", "b.jpg"]
    assert notes == [
        "a.csv, line 4: a quote is not closed before the end of the file; is the file whole?; "
        "what follows is left out"
    ]
    data = Path(parquet("a.parquet", path=["x.jpg"] * 10)).read_bytes()
    Path("a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: can't be read: "):
        found("a.parquet")


def test_a_pattern_with_the_suffix_of_a_list_matches_lists(folder: Path) -> None:
    (folder / "in").mkdir()
    write("in/2.csv", "path\nb.jpg\n")
    write("in/10.csv", "path\nc.jpg\n")
    write("in/1.csv", "img,photo\nd.jpg,e.jpg\n")
    write("in/x.jpg", "")
    notes: list[str] = []
    assert found("in/*.csv", notes=notes) == ["b.jpg", "c.jpg"]
    assert notes == [
        "in/1.csv: several columns of photos among 'img', 'photo'; name the column of the photos: "
        "--column img"
    ]
    assert found("in/*") == ["in/x.jpg"]


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (b"a.jpg\nb c.jpg\r\n\n", ["a.jpg", "b c.jpg"]),
        (b"a.jpg\0line\nbreak.jpg\0", ["a.jpg", "line\nbreak.jpg"]),
        (b"line\nbreak.jpg\0a\r\0b", ["line\nbreak.jpg", "a\r", "b"]),
        (b"latin-\xff.jpg", [LATIN]),
        (b"x" * 4000 + b"\0" + b"y\0" * 90_000, ["x" * 4000, *["y"] * 90_000]),
        (b"\n".join(b"%d.jpg" % n for n in range(50_000)), [f"{n}.jpg" for n in range(50_000)]),
        (b"a.jpg\n" * 1000 + b"b\0.jpg", ["a.jpg"] * 1000 + ["b\0.jpg"]),
    ],
)
def test_standard_input_is_separated_by_line_breaks_or_nul(data: bytes, paths: list[str]) -> None:
    assert found("-", stdin=io.BytesIO(data)) == paths
    text = io.TextIOWrapper(io.BytesIO(data), "ascii")
    assert found("-", stdin=text) == paths


def test_standard_input_is_read_from_sys_stdin_or_a_given_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg\n")))
    assert found("-") == ["a.jpg"]
    assert found("-", stdin=io.StringIO("ü.jpg\n")) == ["ü.jpg"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="-: no paths came; write one a line"):
        found("-")


def test_a_pipe_is_streamed(folder: Path) -> None:
    out, into = os.pipe()
    with os.fdopen(into, "wb", buffering=0) as writer, os.fdopen(out, "rb") as reader:
        writer.write(b"a.jpg\n" * 1000)
        names = sources.find(["-"], stdin=reader)
        assert next(names) == "a.jpg"  # before the pipe is closed
        writer.write(b"b.jpg\n")
        writer.close()
        assert list(names) == ["a.jpg"] * 999 + ["b.jpg"]


def test_a_first_nul_that_arrives_late_on_a_pipe_still_separates_the_paths() -> None:
    out, into = os.pipe()
    with os.fdopen(into, "wb", buffering=0) as writer, os.fdopen(out, "rb") as reader:
        writer.write(b"line\n")
        late = threading.Timer(0.2, lambda: (writer.write(b"break.jpg\0b.jpg\0"), writer.close()))
        late.start()
        assert found("-", stdin=reader) == ["line\nbreak.jpg", "b.jpg"]
        late.join()


def test_the_table_of_scores_is_a_list(folder: Path) -> None:
    write("scores.csv", f'path,status,top_k\n{LATIN},ok,"[[""a"", 1]]"\nb.jpg,error,\n')
    assert found("scores.csv") == [LATIN, "b.jpg"]


def test_a_name_that_no_file_can_have_counts_as_a_row_without_a_path(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"path": "\\ud800.jpg"}\n{"path": "\\udcff.jpg"}\n')
    notes: list[str] = []
    assert list(lists.read_column(*lists.open_list(str(path), None), notes.append)) == [
        "\udcff.jpg"
    ]
    assert notes == [f"{path}: rows without a path in path are left out: 1, the first is line 1"]


# ---- lists of other systems and programs


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_utf_16_are_read(folder: Path, encoding: str, end: str) -> None:
    text = end.join(["ü.jpg", "b c.jpg", ""])
    (folder / "list.txt").write_bytes(text.encode(encoding))
    assert found("list.txt") == ["ü.jpg", "b c.jpg"]
    (folder / "list.csv").write_bytes(
        f"image;label{end}ü.jpg;x{end}b c.jpg;y{end}".encode(encoding)
    )
    assert found("list.csv") == ["ü.jpg", "b c.jpg"]
    if encoding in ("utf-8", "utf-8-sig", "utf-16"):  # with a mark, as the shell writes it
        assert found("-", stdin=io.BytesIO(text.encode(encoding))) == ["ü.jpg", "b c.jpg"]


def test_a_list_in_utf_16_that_was_cut_is_said(folder: Path) -> None:
    (folder / "list.txt").write_bytes("a.jpg\nb.jpg\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"list\.txt: can't be read: .*truncated data"):
        found("list.txt")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "list.csv",
            b"PK\x03\x04" + bytes(40),
            "list.csv: it is a spreadsheet or zip archive; save",
        ),
        (
            "list.txt",
            b"PK\x03\x04" + bytes(40),
            "list.txt: it is a spreadsheet or zip archive; save",
        ),
        (
            "list.txt",
            b"<!DOCTYPE html>",
            "list.txt: it is a web page, not a table; download the fi",
        ),
    ],
)
def test_what_is_no_list_is_said(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        found(name)


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.jsonl"])
def test_paths_that_are_relative_to_the_list_are_found(folder: Path, name: str) -> None:
    (folder / "in" / "a").mkdir(parents=True)
    (folder / "a").mkdir()
    for path in ("in/a/1.jpg", "in/2.jpg"):
        write(path, "")
    paths = ["a/1.jpg", "2.jpg", "gone.jpg", "s3://b/3.jpg"]
    lines = {
        "list.txt": paths,
        "list.csv": ["file,label", *(f"{path},x" for path in paths)],
        "list.jsonl": [json.dumps({"path": path}) for path in paths],
    }
    write(f"in/{name}", "\n".join(lines[name]))
    assert found(f"in/{name}") == ["in/a/1.jpg", "in/2.jpg", "in/gone.jpg", "s3://b/3.jpg"]
    write("a/1.jpg", "")  # one is there from the current folder: they start from it, as ever
    assert found(f"in/{name}") == paths


@pytest.mark.parametrize("name", ["list.txt", "in/list.txt"])
def test_paths_of_windows_are_found_and_others_stay(folder: Path, name: str) -> None:
    (folder / "in" / "a").mkdir(parents=True)
    write("in/a/1.jpg", "")
    write("odd\\name.jpg", "")
    start = "" if name.startswith("in") else "in\\"
    write(name, f"{start}a\\1.jpg\r\nodd\\name.jpg\r\ngone\\x.jpg\r\n")
    expected = ["in/a/1.jpg", "odd\\name.jpg", "gone\\x.jpg"]
    if name.startswith("in"):
        (folder / "odd\\name.jpg").unlink()
        expected = ["in/a/1.jpg", "in/odd\\name.jpg", "in/gone\\x.jpg"]
    assert found(name) == expected


def test_lists_without_names_of_columns_are_read(folder: Path) -> None:
    write("0001", "")
    assert found(write("a.csv", "0001\n0002\n")) == ["0001", "0002"]
    assert found(write("a.csv", "x.jpg\ny.jpg\n")) == ["x.jpg", "y.jpg"]
    assert found(write("a.tsv", "ants\tx.jpg\nbees\ty.jpg\n")) == ["x.jpg", "y.jpg"]
    assert found(write("a.csv", "0001,x\n0002,y\n"), column="1") == ["0001", "0002"]


def test_rows_of_more_fields_than_columns_are_counted_and_noted(folder: Path) -> None:
    notes: list[str] = []
    write("a.csv", "path\na.jpg\nb, c.jpg\nd.jpg,\ne, f.jpg\n")
    assert found("a.csv", notes=notes) == ["a.jpg", "d.jpg"]
    assert notes == ["a.csv: rows of more than 1 fields are left out: 2, the first is line 3"]
