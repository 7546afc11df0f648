"""Laws of finding inputs: folders, files, patterns, and what is said of what is none."""

import inspect
import os
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from serving.errors import BrokenImage, DataError, OptionError
from serving.inputs import folders, sources


def found(*words: str | Path, notes: list[str] | None = None, **options: Any) -> list[str]:
    note = [].append if notes is None else notes.append
    return list(sources.find([os.fspath(word) for word in words], note=note, **options))


def grow(root: Path, names: Iterable[str]) -> Path:
    """Files that need hold nothing: finding never opens them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_searched_below_in_natural_order(home: Path) -> None:
    grow(
        home / "in", ["10.jpg", "9.JPG", "b/2.png", "b/10.png", "b.jpg", "a/c/1.webp", "notes.txt"]
    )
    assert found("in") == [
        *("in/9.JPG", "in/10.jpg", "in/a/c/1.webp"),
        *("in/b/2.png", "in/b/10.png", "in/b.jpg"),
    ]
    assert found("in/") == found("in")
    assert found(home / "in") == [str(home / name) for name in found("in")]


def test_hidden_files_lists_and_archives_in_a_folder_are_left_out(home: Path) -> None:
    grow(home / "in", [".x.jpg", "._x.jpg", ".git/x.jpg", "list.csv", "a.tar", "a.tar.gz", "x.jpg"])
    assert found("in") == ["in/x.jpg"]


def test_links_are_followed_and_loops_end(home: Path) -> None:
    grow(home / "in", ["a/x.jpg"])
    (home / "in/a/up").symlink_to(home / "in")
    (home / "in/a/self").symlink_to("self")
    (home / "in/a/self.jpg").symlink_to("self.jpg")
    (home / "in/b").symlink_to("a")
    (home / "in/c.jpg").symlink_to("a/x.jpg")
    (home / "in/gone.jpg").symlink_to("nowhere")
    notes: list[str] = []
    assert found("in", notes=notes) == [
        *("in/a/self.jpg", "in/a/x.jpg", "in/b/self.jpg", "in/b/x.jpg"),
        *("in/c.jpg", "in/gone.jpg"),
    ]
    assert notes == []


def test_folders_may_be_deeper_than_the_stack_of_python(home: Path) -> None:
    name = "in" + "/d" * 300 + "/x.jpg"
    grow(home, [name])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert found("in") == found("in/**/*.jpg") == [name]
    finally:
        sys.setrecursionlimit(limit)


def test_several_inputs_keep_their_order_and_duplicates_stay(home: Path) -> None:
    grow(home, ["b/1.jpg", "b/2.jpg", "a.jpg", "strange.name"])
    words = ["b", "a.jpg", "b/2.jpg", "strange.name", "b"]
    assert found(*words) == [
        *("b/1.jpg", "b/2.jpg", "a.jpg", "b/2.jpg", "strange.name"),
        *("b/1.jpg", "b/2.jpg"),
    ]


def test_names_that_are_no_utf8_survive(home: Path) -> None:
    name = os.fsdecode(b"in/latin-\xfc\xff.jpg")
    grow(home, [name])
    assert found("in") == found("in/*.jpg") == found(name) == [name]
    assert sources.Reader().load(name) == b""


def test_a_folder_that_may_not_be_read_is_said_and_the_rest_found(home: Path) -> None:
    grow(home / "in", ["a/x.jpg", "b/y.jpg"])
    (home / "in/a").chmod(0)
    if os.access("in/a", os.R_OK):
        pytest.skip("root may read every folder")
    notes: list[str] = []
    try:
        assert found("in", "in", notes=notes) == ["in/b/y.jpg"] * 2
    finally:
        (home / "in/a").chmod(0o755)
    assert notes == ["in/a: Permission denied; what is in it is left out"]


def test_what_is_no_folder_is_said_once_and_the_rest_found(home: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    grow(home, [name, "in/x.jpg"])
    notes: list[str] = []
    pattern = f"{name}/*.png"
    assert found(pattern, pattern, "in", notes=notes) == ["in/x.jpg"]
    assert notes[0] == r"\udcff.jpg: Not a directory; what is in it is left out"
    assert notes[1].startswith(r"\udcff.jpg/*.png: matches no images; looked for")
    assert len(notes) == 2


def test_nothing_at_all_is_an_error_with_the_reason(home: Path) -> None:
    grow(home, ["x.jpg", "in/notes.md"])
    with pytest.raises(DataError, match=r"^in: no images found; looked for .*\.jpg, .*\.webp$"):
        found("in")
    with pytest.raises(DataError, match=r"nothing in any of 2 inputs; in: no images .*Not a dir"):
        found("in", "x.jpg/*")
    with pytest.raises(DataError, match="no input"):
        found()


@pytest.mark.parametrize(
    "word", ["gone", "gone.jpg", "gone.csv", "gone.tar", "", "gone.tar::x.jpg", "{x,gone}.jpg"]
)
def test_an_input_that_is_not_there_stops_before_the_first_name(home: Path, word: str) -> None:
    grow(home, ["x.jpg"])
    with pytest.raises(DataError, match="not there; give folders, images, tar archives, lists"):
        sources.find(["x.jpg", word])


def test_nothing_in_one_of_several_inputs_is_said(home: Path) -> None:
    grow(home, ["in/x.jpg", "list.txt"])
    (home / "none").mkdir()
    notes: list[str] = []
    assert found("none", "in", "list.txt", notes=notes) == ["in/x.jpg"]
    assert [note.partition(";")[0] for note in notes] == [
        "none: no images found",
        "list.txt: lists no images",
    ]


TREE = (
    *("p/1.jpg", "p/2.png", "p/10.jpg", "p/a/1.jpg", "p/a/b/3.jpg", "p/b/4.png"),
    *("p/.h/5.jpg", "p/.6.jpg", "p/a/7.bin", "p/notes.txt", "p/[1]/8.jpg", "q/9.jpg"),
)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("p/*.jpg", "p/1.jpg p/10.jpg"),
        ("p/?.*", "p/1.jpg p/2.png"),
        ("p/[12]*.???", "p/1.jpg p/2.png p/10.jpg"),
        ("p/**/*.png", "p/2.png p/b/4.png"),
        ("p/**/1.jpg", "p/1.jpg p/a/1.jpg"),
        ("**/b/*", "p/a/b/3.jpg p/b/4.png"),
        ("p/[ab]", "p/a/1.jpg p/a/b/3.jpg p/b/4.png"),
        ("p/[ab]/", "p/a/1.jpg p/a/b/3.jpg p/b/4.png"),
        ("p/[1a]*/", "p/a/1.jpg p/a/b/3.jpg"),
        ("p/[1a]*/**", "p/a/1.jpg p/a/b/3.jpg"),
        ("p/**", "p/1.jpg p/2.png p/10.jpg p/[1]/8.jpg p/a/1.jpg p/a/b/3.jpg p/b/4.png"),
        ("[pq]/[0-9].jpg", "p/1.jpg q/9.jpg"),
        ("p/.h/*", "p/.h/5.jpg"),
        ("p/.*", "p/.6.jpg p/.h/5.jpg"),
        ("p/a/*.bin", "p/a/7.bin"),
        ("p/a/7*", ""),
        ("p/[1]/*", "p/[1]/8.jpg"),
        ("*/*/*/*", "p/a/b/3.jpg"),
        ("p/{1,2,10}.*", "p/1.jpg p/2.png p/10.jpg"),
        ("{q,p/b}/*", "q/9.jpg p/b/4.png"),
        ("P/*.jpg", ""),
    ],
)
def test_patterns(home: Path, pattern: str, names: str) -> None:
    grow(home, TREE)
    if names:
        assert found(pattern) == names.split(" ")
        absolute = [str(home / name) for name in names.split(" ")]
        assert "{" in pattern or found(f"{home}/{pattern}") == absolute
    else:
        with pytest.raises(DataError, match=r"matches no images|not there"):
            found(pattern)


def test_a_pattern_finds_nothing_twice_and_survives_loops(home: Path) -> None:
    grow(home, TREE)
    (home / "p/a/up").symlink_to(home / "p")
    names = found("**/**/*")
    assert len(names) == len(set(names)) == 8


def test_a_file_of_that_very_name_is_no_pattern(home: Path) -> None:
    grow(home, ["[ab].jpg", "a.jpg", "b.jpg", "x{1,2}.jpg", "x1.jpg", "x2.jpg"])
    assert found("[ab].jpg", "x{1,2}.jpg") == ["[ab].jpg", "x{1,2}.jpg"]
    (home / "[ab].jpg").unlink()
    (home / "x{1,2}.jpg").unlink()
    assert found("[ab].jpg", "x{1,2}.jpg") == ["a.jpg", "b.jpg", "x1.jpg", "x2.jpg"]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("d-{000..002}.tar", "d-000.tar d-001.tar d-002.tar"),
        ("d-{8..11}", "d-8 d-9 d-10 d-11"),
        ("d-{08..11}", "d-08 d-09 d-10 d-11"),
        ("{2..0}", "2 1 0"),
        ("{a,b}-{0..1}", "a-0 a-1 b-0 b-1"),
        ("{a,}b", "ab b"),
        ("{x}{1..2}", "{x}1 {x}2"),
        ("{a}", "{a}"),
        ("plain", "plain"),
    ],
)
def test_braces_are_written_out(word: str, words: str) -> None:
    assert list(folders.braces(word)) == words.split(" ")


def test_natural_order_does_not_mind_long_numbers() -> None:
    names = ["9" * 5000, "1" + "0" * 5000, "0" * 6000 + "5"]
    assert sorted(names, key=sources.natural) == [names[2], names[0], names[1]]


def test_a_column_without_a_list_that_has_any_is_refused(home: Path) -> None:
    grow(home, ["x.jpg"])
    with pytest.raises(OptionError, match=r"--column file: no input is a list .*\.parquet"):
        sources.find(["x.jpg"], column="file")


def test_what_can_not_be_read_is_a_broken_image(home: Path) -> None:
    (home / "folder.jpg").mkdir()
    (home / "x.bin").touch()
    reader = sources.Reader()
    for name, why in (
        ("folder.jpg", "not a file"),
        ("gone.jpg", "No such file"),
        ("gone.tar::x.jpg", "No such file"),
        ("x.bin::x.jpg", "No such file"),
        ("nul\0.jpg", "not a path"),
        ("nul\0::.jpg", "not a path"),
    ):
        with pytest.raises(BrokenImage, match=why):
            reader.load(name)


def test_a_pipe_by_name_is_no_image_and_nobody_waits_for_it(home: Path) -> None:
    for name in ("pipe.jpg", "pipe.tar", "pipe.csv", "pipe"):
        os.mkfifo(name)
        assert found(name) == [name]
        with pytest.raises(BrokenImage, match="not a file"):
            sources.Reader().load(name)
    with pytest.raises(BrokenImage, match="No such file"):
        sources.Reader().load("pipe.tar::x.jpg")


def test_a_hundred_thousand_names_take_no_memory_to_speak_of(home: Path) -> None:
    grow(home / "one", [f"{number:03}-a-name-that-is-long-enough.jpg" for number in range(1000)])
    (home / "in").mkdir()
    for number in range(100):
        (home / "in" / f"{number}").symlink_to(home / "one")
    (home / "list.txt").write_text("".join(f"in/some/where/{n}.jpg\n" for n in range(100_000)))
    for word in ("in", "list.txt"):
        tracemalloc.start()
        try:
            count = sum(1 for _ in sources.find([word]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 100_000
        assert peak < 2_000_000
