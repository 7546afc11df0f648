"""Finding inputs: folders, files, patterns; notes and errors for the others."""

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
from serving.utils.natural_sort import natural


def found(*words: str | Path, notes: list[str] | None = None, **options: Any) -> list[str]:
    note = [].append if notes is None else notes.append
    return list(sources.find([os.fspath(word) for word in words], note=note, **options))


def create(root: Path, names: Iterable[str]) -> Path:
    """Create empty files: finding inputs does not open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_searched_below_in_natural_order(folder: Path) -> None:
    create(
        folder / "in",
        ["10.jpg", "9.JPG", "b/2.png", "b/10.png", "b.jpg", "a/c/1.webp", "notes.txt"],
    )
    assert found("in") == [
        *("in/9.JPG", "in/10.jpg", "in/a/c/1.webp"),
        *("in/b/2.png", "in/b/10.png", "in/b.jpg"),
    ]
    assert found("in/") == found("in")
    assert found(folder / "in") == [str(folder / name) for name in found("in")]


def test_hidden_files_lists_and_archives_in_a_folder_are_left_out(folder: Path) -> None:
    create(
        folder / "in", [".x.jpg", "._x.jpg", ".git/x.jpg", "list.csv", "a.tar", "a.tar.gz", "x.jpg"]
    )
    assert found("in") == ["in/x.jpg"]


def test_symlinks_are_followed_except_in_loops(folder: Path) -> None:
    create(folder / "in", ["a/x.jpg"])
    (folder / "in/a/up").symlink_to(folder / "in")
    (folder / "in/a/self").symlink_to("self")
    (folder / "in/a/self.jpg").symlink_to("self.jpg")
    (folder / "in/b").symlink_to("a")
    (folder / "in/c.jpg").symlink_to("a/x.jpg")
    (folder / "in/gone.jpg").symlink_to("nowhere")
    notes: list[str] = []
    assert found("in", notes=notes) == [
        *("in/a/self.jpg", "in/a/x.jpg", "in/b/self.jpg", "in/b/x.jpg"),
        *("in/c.jpg", "in/gone.jpg"),
    ]
    assert notes == []


def test_folders_may_be_deeper_than_the_stack_of_python(folder: Path) -> None:
    name = "in" + "/d" * 300 + "/x.jpg"
    create(folder, [name])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert found("in") == found("in/**/*.jpg") == [name]
    finally:
        sys.setrecursionlimit(limit)


def test_several_inputs_keep_their_order_and_duplicates_stay(folder: Path) -> None:
    create(folder, ["b/1.jpg", "b/2.jpg", "a.jpg", "strange.name"])
    words = ["b", "a.jpg", "b/2.jpg", "strange.name", "b"]
    assert found(*words) == [
        *("b/1.jpg", "b/2.jpg", "a.jpg", "b/2.jpg", "strange.name"),
        *("b/1.jpg", "b/2.jpg"),
    ]


def test_names_that_are_not_utf8_are_unchanged(folder: Path) -> None:
    name = os.fsdecode(b"in/latin-\xfc\xff.jpg")
    create(folder, [name])
    assert found("in") == found("in/*.jpg") == found(name) == [name]
    assert sources.Reader().load(name) == b""


def test_an_unreadable_folder_is_noted_and_the_rest_found(folder: Path) -> None:
    create(folder / "in", ["a/x.jpg", "b/y.jpg"])
    (folder / "in/a").chmod(0)
    if os.access("in/a", os.R_OK):
        pytest.skip("root may read every folder")
    notes: list[str] = []
    try:
        assert found("in", "in", notes=notes) == ["in/b/y.jpg"] * 2
    finally:
        (folder / "in/a").chmod(0o755)
    assert notes == ["in/a: Permission denied; what is in it is left out"]


def test_a_pattern_below_a_file_is_noted_once_and_the_rest_found(folder: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    create(folder, [name, "in/x.jpg"])
    notes: list[str] = []
    pattern = f"{name}/*.png"
    assert found(pattern, pattern, "in", notes=notes) == ["in/x.jpg"]
    assert notes[0] == r"\udcff.jpg: Not a directory; what is in it is left out"
    assert notes[1].startswith(r"\udcff.jpg/*.png: matches no images; looked for")
    assert len(notes) == 2


def test_no_image_at_all_is_an_error_with_the_reason(folder: Path) -> None:
    create(folder, ["x.jpg", "in/notes.md"])
    with pytest.raises(
        DataError,
        match=r"^in: no images found; looked for .*\.jpg, .*\.webp; passed over: 1 file that is no "
        r"image \(\.md\)$",
    ):
        found("in")
    with pytest.raises(DataError, match=r"nothing in any of 2 inputs; in: no images .*Not a dir"):
        found("in", "x.jpg/*")
    with pytest.raises(DataError, match="no input"):
        found()


@pytest.mark.parametrize(
    "word", ["gone", "gone.jpg", "gone.csv", "gone.tar", "", "gone.tar::x.jpg", "{x,gone}.jpg"]
)
def test_a_missing_input_is_an_error_before_the_first_name(folder: Path, word: str) -> None:
    create(folder, ["x.jpg"])
    with pytest.raises(
        DataError, match="not there; give folders, images, zip and tar archives, lists"
    ):
        sources.find(["x.jpg", word])


def test_an_input_without_images_is_noted(folder: Path) -> None:
    create(folder, ["in/x.jpg", "list.txt"])
    (folder / "none").mkdir()
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
def test_a_pattern_finds_the_matching_images_in_natural_order(
    folder: Path, pattern: str, names: str
) -> None:
    create(folder, TREE)
    if names:
        assert found(pattern) == names.split(" ")
        absolute = [str(folder / name) for name in names.split(" ")]
        assert "{" in pattern or found(f"{folder}/{pattern}") == absolute
    else:
        with pytest.raises(DataError, match=r"matches no images|not there"):
            found(pattern)


def test_a_pattern_finds_each_image_once_and_ends_in_symlink_loops(folder: Path) -> None:
    create(folder, TREE)
    (folder / "p/a/up").symlink_to(folder / "p")
    names = found("**/**/*")
    assert len(names) == len(set(names)) == 8


def test_an_existing_name_is_not_treated_as_a_pattern(folder: Path) -> None:
    create(folder, ["[ab].jpg", "a.jpg", "b.jpg", "x{1,2}.jpg", "x1.jpg", "x2.jpg"])
    assert found("[ab].jpg", "x{1,2}.jpg") == ["[ab].jpg", "x{1,2}.jpg"]
    (folder / "[ab].jpg").unlink()
    (folder / "x{1,2}.jpg").unlink()
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
def test_braces_are_expanded(word: str, words: str) -> None:
    assert list(folders.expand_braces(word)) == words.split(" ")


def test_natural_order_of_long_numbers() -> None:
    names = ["9" * 5000, "1" + "0" * 5000, "0" * 6000 + "5"]
    assert sorted(names, key=natural) == [names[2], names[0], names[1]]


def test_a_column_without_a_list_with_columns_is_refused(folder: Path) -> None:
    create(folder, ["x.jpg"])
    with pytest.raises(OptionError, match=r"--column file: no input is a list .*\.parquet"):
        sources.find(["x.jpg"], column="file")


def test_an_unreadable_input_is_a_broken_image(folder: Path) -> None:
    (folder / "folder.jpg").mkdir()
    (folder / "x.bin").touch()
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


def test_a_named_pipe_is_no_image_and_is_not_opened(folder: Path) -> None:
    for name in ("pipe.jpg", "pipe.tar", "pipe.csv", "pipe"):
        os.mkfifo(name)
        assert found(name) == [name]
        with pytest.raises(BrokenImage, match="not a file"):
            sources.Reader().load(name)
    with pytest.raises(BrokenImage, match="No such file"):
        sources.Reader().load("pipe.tar::x.jpg")


def test_thirty_thousand_names_take_less_than_1_mb(folder: Path) -> None:
    create(
        folder / "one", [f"{number:03}-a-name-that-is-long-enough.jpg" for number in range(1000)]
    )
    (folder / "in").mkdir()
    for number in range(30):
        (folder / "in" / f"{number}").symlink_to(folder / "one")
    (folder / "list.txt").write_text("".join(f"in/some/where/{n}.jpg\n" for n in range(30_000)))
    for word in ("in", "list.txt"):
        tracemalloc.start()
        try:
            count = sum(1 for _ in sources.find([word]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 30_000
        assert peak < 1_000_000
